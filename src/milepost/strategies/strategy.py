"""The base class of strategies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from milepost import _distributed
from milepost.errors import MisconfigurationException
from milepost.plugins.io import checkpoint_io as io_calls
from milepost.plugins.io.torch_io import TorchCheckpointIO
from milepost.precision.precision import Precision, make_precision
from milepost.strategies import saving

if TYPE_CHECKING:
    from milepost.plugins.io.checkpoint_io import Pending
    from milepost.trainer.trainer import Trainer

T = TypeVar("T")


class Strategy:
    """Places the model on devices and passes checkpoints to a `CheckpointIO`.

    Args:
        checkpoint_io: any object with ``save_checkpoint``, ``load_checkpoint`` and ``remove_checkpoint``;
            a `TorchCheckpointIO` where none is given.

    Raises:
        MisconfigurationException: `checkpoint_io` lacks one of the three methods.
    """

    def __init__(self, checkpoint_io: Any = None) -> None:
        self._checkpoint_io: Any = None
        if checkpoint_io is not None:
            self.checkpoint_io = checkpoint_io
        self._lightning_module: Any = None
        self.parts_to_restore: frozenset[str] = frozenset()
        """Set by the Trainer before `load_checkpoint`: what of the checkpoint this run takes."""
        self.stepping_optimizers: Sequence[torch.optim.Optimizer] = ()
        """Set by the Trainer for a save: those whose ``step`` alone changes their parameters and state from then on,
        until the plugin's ``staged()`` is called."""

    @property
    def root_device(self) -> torch.device:
        raise NotImplementedError

    @property
    def checkpoint_io(self) -> Any:
        """How checkpoints are stored."""
        if self._checkpoint_io is None:
            self._checkpoint_io = self.default_checkpoint_io()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: Any) -> None:
        if not io_calls.is_checkpoint_io(io):
            raise MisconfigurationException(
                f"checkpoint_io={io!r} is not a CheckpointIO: it needs the methods save_checkpoint, load_checkpoint and"
                " remove_checkpoint."
            )
        self._checkpoint_io = io

    def default_checkpoint_io(self) -> Any:
        """The one that is made where none was given."""
        return TorchCheckpointIO()

    @property
    def has_own_checkpoint_io(self) -> bool:
        """Whether a CheckpointIO was given, here or by the Trainer."""
        return self._checkpoint_io is not None

    @property
    def lightning_module(self) -> Any:
        return self._lightning_module

    @property
    def model(self) -> Any:
        return self._lightning_module

    @property
    def is_global_zero(self) -> bool:
        return _distributed.announced_rank() == 0

    @property
    def world_size(self) -> int:
        """Ranks that train together."""
        return _distributed.world_size()

    @property
    def data_ranks(self) -> int:
        """How many parts the data is divided into: ranks that hold one replica together read the same."""
        return self.world_size

    @property
    def data_rank(self) -> int:
        """Which of these parts is this rank's."""
        return _distributed.rank()

    @property
    def num_devices(self) -> int:
        """Devices of this machine that the run uses."""
        return 1

    @property
    def num_nodes(self) -> int:
        """Machines that the run uses."""
        return 1

    def place(self, accelerator: str, devices: Any, num_nodes: int) -> None:
        """Told by the Trainer, when it is made, what it was given. A strategy that knows its device does nothing."""

    def launch(self) -> None:
        """Called first in every run: start or join the other ranks. It need not return: `ParallelStrategy`."""

    def connect(self, module: Any) -> None:
        """Called by the Trainer at the start of every run."""
        self._lightning_module = module

    def check_precision(self, precision: Precision) -> None:
        """Refuse, when the Trainer is made, a precision that cannot be had with this strategy."""

    def shard(self, trainer: Trainer) -> None:
        """Called once the module is built (`configure_model`), before a checkpoint is loaded into it."""

    def setup(self, trainer: Trainer) -> None:
        """Called after the checkpoint's weights are in place: move the module to its device."""
        self._lightning_module.to(self.root_device)

    def make_precision(self, precision: str | int | None) -> Precision:
        """The Precision for the Trainer's argument of that name, where none is among its plugins."""
        return make_precision(precision, self.root_device.type)

    def take_optimizers(self, trainer: Trainer) -> None:
        """Called in a fit after `setup`, when ``trainer.optimizers`` are made, not yet restored. May replace them."""

    # ---- steps ---------------------------------------------------------------------------------------------------

    def run_training_step(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Run ``call(*arguments)``, the module's training step. A strategy that wraps the model goes through it."""
        return call(*arguments)

    def run_backward(self, loss: torch.Tensor, *arguments: Any, **options: Any) -> None:
        """Compute gradients: what the module's `backward` does unless it is overridden."""
        loss.backward(*arguments, **options)  # type: ignore[no-untyped-call]

    def backward_done(self) -> None:
        """Called after each backward pass of automatic and manual optimization."""

    def without_gradient_sync(self) -> AbstractContextManager[Any]:
        """Entered around a batch whose gradients are only added up, and not stepped with yet."""
        return nullcontext()

    def before_evaluation(self) -> None:
        """Called on every rank before a validation, test or prediction begins."""

    @property
    def saves_on_every_rank(self) -> bool:
        """Whether a save now takes what every rank has, through a plugin that puts it together."""
        return self.world_size > 1 and io_calls.takes_every_rank(self.checkpoint_io)

    def before_saving(self) -> None:
        """Called on every rank before such a save: what is saved once is to be the same on all of them."""

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str, storage_options: Any = None) -> Pending:
        """Store `checkpoint`; returns a handle that is done once the checkpoint is durable. Called on every rank.

        A `CheckpointIO` that takes every rank's part is called on each. Any other is called on rank 0, and what each
        rank has for itself (`milepost.PerRank`) stands there as the list of all.

        Raises:
            CheckpointSaveError: it failed on rank 0, whose error this is there; raised on every rank.
        """
        return saving.save(self.checkpoint_io, checkpoint, filepath, storage_options, self.stepping_optimizers)

    def save_checkpoint_alone(self, checkpoint: dict[str, Any], filepath: str) -> Pending:
        """The same while an error ends the run, when ranks cannot meet: rank 0 saves what it has, others do nothing.

        Raises:
            CheckpointSaveError: the plugin needs every rank.
        """
        return saving.save_alone(self.checkpoint_io, checkpoint, filepath)

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Ask the plugin whether `checkpoint` could be stored; raises what it raises."""
        io_calls.check(self.checkpoint_io, saving.own_part(self.checkpoint_io, checkpoint))

    @property
    def restores_model(self) -> bool:
        """Whether `take_optimizers` puts back the weights of the checkpoint that was loaded last."""
        return False

    @property
    def restores_optimizer(self) -> bool:
        """The same of the optimizer's state."""
        return False

    def load_checkpoint(self, checkpoint_path: str, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; tensors come back on the CPU unless the plugin decides otherwise."""
        loaded: dict[str, Any] = io_calls.load(self.checkpoint_io, checkpoint_path, weights_only=weights_only)
        return loaded

    def remove_checkpoint(self, filepath: str) -> None:
        """Delete a checkpoint. Rank 0 does."""
        if self.is_global_zero:
            io_calls.remove(self.checkpoint_io, filepath)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights that a checkpoint gets. Override it to save others, such as those that are trained only."""
        state: dict[str, Any] = self._lightning_module.state_dict()
        return state

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What a checkpoint gets of `optimizer`."""
        return optimizer.state_dict()

    def barrier(self, name: str | None = None) -> None:
        _distributed.barrier()

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Rank `src`'s `obj`, on every rank. Call it on all of them, as the three below."""
        return _distributed.broadcast_object(obj, src)

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        """Every rank's `tensor`, stacked; `tensor` itself where there is one rank."""
        return _distributed.all_gather(tensor, group, sync_grads=sync_grads)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: str | None = "mean") -> Any:
        """The mean, or with ``reduce_op="sum"`` the sum, of all ranks' `tensor`; what is no tensor is left alone."""
        if not isinstance(tensor, torch.Tensor) or not _distributed.is_initialized():
            return tensor
        parts = _distributed.all_gather(tensor, group)
        if str(reduce_op).lower() == "sum":
            return parts.sum(0)
        return parts.to(torch.promote_types(parts.dtype, torch.float32)).mean(0)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks decided so, or with ``all=False`` any of them."""
        votes = _distributed.all_gather(torch.tensor(decision, device=self.root_device))
        return bool(votes.all() if all else votes.any())

    def on_exception(self, exception: BaseException) -> None:
        """Called when a run is interrupted by `exception`, after the callbacks and before `teardown`."""

    def teardown(self) -> None:
        """Called at the end of every run, after an error too: waits for what the plugin still has under way."""
        if self._checkpoint_io is not None:
            io_calls.teardown(self._checkpoint_io)
