"""XLA devices: TPUs, and the CPU that torch_xla offers to try programs on (``PJRT_DEVICE=CPU``)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from milepost import _optional
from milepost._distributed import PerRank
from milepost.errors import MisconfigurationException
from milepost.plugins.io.checkpoint_io import Completed
from milepost.plugins.io.xla_io import XLACheckpointIO
from milepost.strategies.strategy import Strategy

if TYPE_CHECKING:
    from milepost.plugins.io.checkpoint_io import Pending
    from milepost.trainer.trainer import Trainer

ACCELERATORS = ("tpu", "xla")
XLA_NAMES = ("single_xla", "single_tpu", "xla", "xla_debug")


class SingleDeviceXLAStrategy(Strategy):
    """Run on one XLA device.

    Operations there are put off and compiled together, up to the end of a backward pass or of an optimizer step.
    Checkpoints are handed to the plugin with all tensors on the host, whatever the plugin is.

    Args:
        device: its index, or ``torch.device("xla:0")``.
        accelerator: as Lightning has it; not used.
        checkpoint_io: how checkpoints are stored: an `XLACheckpointIO` where none is given.
        debug: set PT_XLA_DEBUG, with which torch_xla reports what it compiles.

    Raises:
        MissingDependencyError: torch_xla is not installed.
    """

    def __init__(
        self,
        device: torch.device | str | int = 0,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        debug: bool = False,
    ) -> None:
        super().__init__(checkpoint_io)
        self._xla = _optional.require("torch_xla", extra="xla", needed_by=type(self).__name__)
        self._index = device if isinstance(device, int) else torch.device(device).index or 0
        self._hook: Any = None
        if debug:
            os.environ["PT_XLA_DEBUG"] = "1"

    @property
    def root_device(self) -> torch.device:
        return torch.device("xla", self._index)

    def default_checkpoint_io(self) -> Any:
        return XLACheckpointIO()

    def place(self, accelerator: str, devices: Any, num_nodes: int) -> None:
        """Refuse another accelerator, and what needs several devices.

        Raises:
            MisconfigurationException: names the argument.
        """
        if accelerator not in ("auto", *ACCELERATORS):
            raise MisconfigurationException(
                f"accelerator={accelerator!r} with {type(self).__name__}, which runs on an XLA device: give 'tpu' or"
                " leave it at 'auto'; torch_xla's CPU is chosen by the environment variable PJRT_DEVICE=CPU."
            )
        if num_nodes != 1 or devices not in ("auto", None, 1, "1", [self._index], (self._index,)):
            raise _refused_several(self, f"devices={devices!r}, num_nodes={num_nodes!r}")

    def setup(self, trainer: Trainer) -> None:
        """Move the module to the device; parameters that are shared stay so."""
        shared = _shared_parameters(self._lightning_module)
        self._lightning_module.to(self.root_device)  # an XLA device makes each module's parameters anew
        for places in shared:
            first, name = places[0]
            for module, other in places[1:]:
                setattr(module, other, getattr(first, name))
        self._stop()
        self._hook = register_optimizer_step_post_hook(self._step_done)

    def backward_done(self) -> None:
        """Compile and run what has been put off: nothing else would, until somebody looks at a value.

        The device's random state is a number that moves on here, and only here and after a step: a save between two
        batches finds all that was drawn in that number, and need not move it.
        """
        self._xla.sync()

    def _step_done(self, *_: Any) -> None:
        self._xla.sync()

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str, storage_options: Any = None) -> Pending:
        """As `Strategy.save_checkpoint`, with all tensors on the host; the process of the first device saves."""
        host = self._on_host(checkpoint)
        if not self.is_global_zero:
            return Completed(filepath)
        return super().save_checkpoint(host, filepath, storage_options)

    def save_checkpoint_alone(self, checkpoint: dict[str, Any], filepath: str) -> Pending:
        host = self._on_host(checkpoint)
        return super().save_checkpoint_alone(host, filepath) if self.is_global_zero else Completed(filepath)

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().check_checkpoint(self._on_host(checkpoint))

    def _on_host(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        moved: dict[str, Any] = on_host(checkpoint, {})
        return moved

    def teardown(self) -> None:
        self._stop()
        super().teardown()

    def _stop(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


class XLAStrategy(SingleDeviceXLAStrategy):
    """All XLA devices, as Lightning names it. It runs where the runtime has one, and refuses where it has several.

    Several devices want one process, or thread, for each, and an all-reduce of the gradients among them. On torch_xla's
    CPU, the one runtime at hand, that all-reduce never came to an end, so nothing of it could be shown to work.

    Args:
        accelerator, parallel_devices: as Lightning has them; not used.
        checkpoint_io: how checkpoints are stored: an `XLACheckpointIO` where none is given.
        debug: set PT_XLA_DEBUG, with which torch_xla reports what it compiles.

    Raises:
        MissingDependencyError: torch_xla is not installed.
    """

    def __init__(
        self, accelerator: Any = None, parallel_devices: Any = None, checkpoint_io: Any = None, debug: bool = False
    ) -> None:
        super().__init__(checkpoint_io=checkpoint_io, debug=debug)

    @property
    def is_global_zero(self) -> bool:
        model = _optional.require("torch_xla.core.xla_model", extra="xla", needed_by="XLAStrategy")
        return bool(model.is_master_ordinal(local=False))

    @property
    def root_device(self) -> torch.device:
        device: torch.device = self._xla.device()  # that of this process or thread
        return device

    def setup(self, trainer: Trainer) -> None:
        """As on one device.

        Raises:
            MisconfigurationException: the runtime has several devices.
        """
        runtime = _optional.require("torch_xla.runtime", extra="xla", needed_by="XLAStrategy")
        if runtime.world_size() > 1 or runtime.addressable_device_count() > 1:
            found = max(runtime.world_size(), runtime.addressable_device_count())
            raise _refused_several(self, f"the runtime has {found} devices")
        super().setup(trainer)


def xla_strategy(name: str, devices: Any) -> Strategy:
    """The strategy of a name on an XLA device.

    Raises:
        MisconfigurationException: the strategy of that name does not run there.
    """
    if name in ("auto", "single_device", *XLA_NAMES[:2]):
        index = devices[0] if isinstance(devices, (list, tuple)) and len(devices) == 1 else 0
        return SingleDeviceXLAStrategy(index)
    if name not in XLA_NAMES:
        raise MisconfigurationException(
            f"Trainer(strategy={name!r}) does not run on an XLA device: use one of 'auto', {', '.join(XLA_NAMES)}."
        )
    return XLAStrategy(debug=name == "xla_debug")


def _refused_several(strategy: Strategy, what: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"{type(strategy).__name__}: {what}; it trains on one XLA device, for an all-reduce among several could not be"
        " tried (docs/many-ranks.md). Use devices=1, with one device visible to the process (TPU_VISIBLE_CHIPS=0)."
    )


def on_host(value: Any, seen: dict[Any, Any]) -> Any:
    """A copy of the containers with every tensor in the host's memory. What is one tensor stays one."""
    if isinstance(value, torch.Tensor):
        if value.device.type == "cpu":
            return value
        place = (value.untyped_storage()._cdata, value.shape, value.stride(), value.storage_offset())
        if place not in seen:  # a state dict names one parameter by several objects where it is shared
            seen[place] = (value.detach().cpu(), value)  # kept, so that its storage is nobody else's
        return seen[place][0]
    if isinstance(value, PerRank):
        return PerRank(on_host(value.value, seen))
    if isinstance(value, dict):
        moved = value.copy()  # an OrderedDict with its `_metadata`, whatever its class
        for key, item in value.items():
            moved[key] = on_host(item, seen)
        return moved
    if type(value) in (list, tuple):
        return type(value)(on_host(item, seen) for item in value)
    return value


def _shared_parameters(module: torch.nn.Module) -> list[list[tuple[torch.nn.Module, str]]]:
    """The places of each parameter that has several."""
    places: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((part, name))
    return [found for found in places.values() if len(found) > 1]
