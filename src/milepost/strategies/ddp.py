"""The same model on every rank; gradients are averaged by torch's DistributedDataParallel."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from milepost import _distributed
from milepost.errors import MisconfigurationException
from milepost.strategies.parallel import ParallelStrategy

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer


class DDPStrategy(ParallelStrategy):
    """Train one replica of the model on each rank.

    Args:
        checkpoint_io: how checkpoints are stored. Any that takes a dict will do: rank 0 alone is asked to save.
        process_group_backend: torch's name for it; gloo for CPUs, gloo and nccl for GPUs by default.
        timeout: after which a collective that does not come about is an error.
        ddp_comm_hook: takes the place of the averaging, as ``DistributedDataParallel.register_comm_hook`` has it.
        ddp_comm_state: first argument of `ddp_comm_hook`.
        ddp_comm_wrapper: called with `ddp_comm_hook`, returns the hook to use.
        accelerator, parallel_devices, cluster_environment, precision_plugin: what Lightning's takes there is given to
            the Trainer here; anything but None is refused.
        ddp_options: go to ``DistributedDataParallel``, such as ``find_unused_parameters=True``.

    Raises:
        MisconfigurationException: an argument that is refused; the message names the remedy.
    """

    def __init__(
        self,
        accelerator: Any = None,
        parallel_devices: Any = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        ddp_comm_state: Any = None,
        ddp_comm_hook: Callable[..., Any] | None = None,
        ddp_comm_wrapper: Callable[..., Any] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        **ddp_options: Any,
    ) -> None:
        super().__init__(checkpoint_io, process_group_backend, timeout)
        refuse(
            accelerator=(accelerator, "Trainer(accelerator=...)"),
            parallel_devices=(parallel_devices, "Trainer(devices=...)"),
            cluster_environment=(cluster_environment, "torchrun, which tells each process its rank"),
            precision_plugin=(precision_plugin, "Trainer(precision=...) or Trainer(plugins=...)"),
            model_averaging_period=(ddp_options.pop("model_averaging_period", None), "ddp_comm_hook"),
        )
        if (method := ddp_options.pop("start_method", "popen")) != "popen":
            raise MisconfigurationException(
                f"start_method={method!r}: ranks are started by torchrun, or as torchrun does. Leave it out."
            )
        self._hook, self._hook_state, self._hook_wrapper = ddp_comm_hook, ddp_comm_state, ddp_comm_wrapper
        self._options = ddp_options
        self._replica: DistributedDataParallel | None = None
        self._step: _TrainingStep | None = None
        self._parameters: list[nn.Parameter] = []
        self._trained: list[bool] = []

    @property
    def model(self) -> Any:
        """The wrapped model while it trains, else the module itself."""
        return self._lightning_module if self._replica is None else self._replica

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        self._replica = self._step = None
        module = self._lightning_module
        self.broadcast_tensors(module.parameters())
        self.broadcast_tensors(module.buffers())
        if trainer.state.fn == "fit" and module.automatic_optimization:
            self._step, self._trained = _TrainingStep(trainer, module), []
            self._parameters = list(self._step.parameters())
            self._refresh()

    def _refresh(self) -> None:
        """Torch's reducer knows the parameters that were trained when it was made: make it anew once others are."""
        trained = [parameter.requires_grad for parameter in self._parameters]
        if self._step is None or trained == self._trained:
            return
        frozen = [p for p, was, now in zip(self._parameters, self._trained, trained, strict=False) if was and not now]
        self._average(frozen)  # what they have from batches before this one of the same step
        self._trained, self._replica = trained, None
        gc.collect()  # the old reducer's hooks on the parameters go with it
        self._replica = self._wrapped(self._step)

    def _wrapped(self, step: _TrainingStep) -> DistributedDataParallel | None:
        if not any(parameter.requires_grad for parameter in step.parameters()):
            return None
        device = self.root_device
        ignored = getattr(step.module, "_ddp_params_and_buffers_to_ignore", ())
        step._ddp_params_and_buffers_to_ignore = [f"module.{name}" for name in ignored]  # type: ignore[assignment]
        replica = DistributedDataParallel(
            step, device_ids=None if device.type == "cpu" else [device.index], **self._options
        )
        if self._hook is not None:
            hook = self._hook if self._hook_wrapper is None else self._hook_wrapper(self._hook)
            replica.register_comm_hook(self._hook_state, hook)
        return replica

    def run_training_step(self, call: Callable[..., Any], *arguments: Any) -> Any:
        self._refresh()  # inside accumulation too: gradients are then averaged once more, which changes no sum of them
        return call(*arguments) if self._replica is None else self._replica(*arguments)

    def backward_done(self) -> None:
        """Where the module optimizes by hand, average what it has on each rank: its forward ran outside the wrapper."""
        if self._step is None:
            parameters = list(self._lightning_module.parameters())
            self._complete(parameters)
            self._average(parameters)

    @torch.no_grad()
    def _complete(self, parameters: list[nn.Parameter]) -> None:
        """A parameter without a gradient here gets zeros where another rank has one: all average the same ones."""
        if not parameters or _distributed.world_size() == 1:
            return
        there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=self.root_device)
        for parameter, elsewhere in zip(parameters, _distributed.reduced(there, "max").tolist(), strict=True):
            if elsewhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def _average(self, parameters: list[nn.Parameter]) -> None:
        """Make the gradients of `parameters` their mean over the ranks; the same parameters on each."""
        if not parameters or _distributed.world_size() == 1:
            return
        for gradients in _by_type(p.grad for p in parameters if p.grad is not None):
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            flat /= _distributed.world_size()
            parts = torch.split(flat, [gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def without_gradient_sync(self) -> AbstractContextManager[Any]:
        """Inside, gradients add up on each rank by itself."""
        self._refresh()
        return nullcontext() if self._replica is None else self._replica.no_sync()

    def before_evaluation(self) -> None:
        """Every rank evaluates the model that would be saved: buffers that ranks have for themselves are rank 0's."""
        if self._replica is None or self._replica.broadcast_buffers:
            self.broadcast_tensors(self._lightning_module.buffers())

    def before_saving(self) -> None:
        self.before_evaluation()

    def teardown(self) -> None:
        self._replica = self._step = None
        self._parameters = []
        super().teardown()


class _TrainingStep(nn.Module):
    """What is wrapped: a module whose forward is the training step, so that the wrapper sees what is computed."""

    def __init__(self, trainer: Trainer, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._call = trainer.training_call

    def forward(self, *arguments: Any) -> Any:
        return self._call(*arguments)


def refuse(**given: tuple[Any, str]) -> None:
    """Arguments that are for something else here: `given` has the value of each, and what to use.

    Raises:
        MisconfigurationException: one of them is not None.
    """
    for name, (value, remedy) in given.items():
        if value is not None:
            raise MisconfigurationException(f"{name}={value!r} is not taken by a strategy here: use {remedy}.")


def _by_type(tensors: Any) -> list[list[torch.Tensor]]:
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
