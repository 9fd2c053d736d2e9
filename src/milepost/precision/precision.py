"""Number formats of training: what is cast, under which autocast the model runs, how gradients are scaled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from milepost.errors import MisconfigurationException, ResumeError
from milepost.precision.clipping import clip_norm, clip_values


class Precision:
    """Everything in the type of the parameters: ``"32-true"``, ``"64-true"``, ``"16-true"``, ``"bf16-true"``."""

    _DTYPES: ClassVar[dict[str, torch.dtype]] = {
        "32-true": torch.float32,
        "64-true": torch.float64,
        "16-true": torch.float16,
        "bf16-true": torch.bfloat16,
    }

    def __init__(self, precision: str = "32-true") -> None:
        self.precision = precision
        self._dtype = self._DTYPES.get(precision, torch.float32)

    @property
    def state_key(self) -> str:
        """Key of this plugin's state in a checkpoint."""
        return type(self).__qualname__

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        return None

    def init_context(self) -> AbstractContextManager[Any]:
        """Entered where the module builds its parameters: they are made in their type, not cast to it."""
        return nullcontext() if self.precision == "32-true" else _default_dtype(self._dtype)

    def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Called before a checkpoint is loaded into the module, which would else lose bits."""
        return module if self.precision == "32-true" else module.to(self._dtype)

    def convert_input(self, batch: Any) -> Any:
        if self.precision == "32-true":
            return batch
        from milepost.trainer.transfer import map_tensors

        return map_tensors(batch, lambda t: t.to(self._dtype) if t.is_floating_point() else t)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Entered around every step of the module: new tensors are of the parameters' type."""
        return self.init_context()

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def step(self, optimizer: Optimizer, closure: Any, before_step: Any, **kwargs: Any) -> Any:
        """Run `closure`, then `before_step` with gradients unscaled, then the optimizer, which gets `kwargs`."""

        def wrapped() -> Any:
            result = closure()
            before_step()
            return result

        return optimizer.step(closure=wrapped, **kwargs)

    def clip_gradients(self, optimizer: Optimizer, limit: float, algorithm: str) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if algorithm == "value":
            clip_values(parameters, limit)
        else:
            clip_norm(parameters, limit)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""


class MixedPrecision(Precision):
    """Parameters in fp32, steps under autocast: ``"bf16-mixed"``, and ``"16-mixed"`` with a gradient scaler."""

    def __init__(self, precision: str, device_type: str) -> None:
        super().__init__("32-true")
        self.precision = precision
        self._device_type = device_type
        self._autocast_dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
        self._scaler = torch.amp.GradScaler(device_type) if precision == "16-mixed" else None

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        return self._scaler

    def init_context(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        return module

    def convert_input(self, batch: Any) -> Any:
        return batch

    def forward_context(self) -> AbstractContextManager[Any]:
        # no cache: a weight cast first where no gradients are kept would stay without them
        return torch.autocast(self._device_type, dtype=self._autocast_dtype, cache_enabled=False)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self._scaler is None else self._scaler.scale(loss)

    def step(self, optimizer: Optimizer, closure: Any, before_step: Any, **kwargs: Any) -> Any:
        if self._scaler is None:
            return super().step(optimizer, closure, before_step, **kwargs)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                "LBFGS runs its closure several times a step, which precision='16-mixed' cannot scale. Use 32 or"
                " bf16-mixed."
            )
        result = closure()
        has_gradients = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        if has_gradients:
            self._scaler.unscale_(optimizer)
        before_step()
        if has_gradients:  # the scaler refuses to step where the batch was skipped
            self._scaler.step(optimizer, **kwargs)
            self._scaler.update()
        return result

    def state_dict(self) -> dict[str, Any]:
        return {} if self._scaler is None else dict(self._scaler.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._scaler is None:
            raise ResumeError(
                f"The checkpoint holds a gradient scaler's state, but precision={self.precision!r} has none. Resume"
                " with precision='16-mixed'."
            )
        self._scaler.load_state_dict(state_dict)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_NAMES = {
    None: "32-true", "32": "32-true", "32-true": "32-true", "64": "64-true", "64-true": "64-true",
    "16": "16-mixed", "16-mixed": "16-mixed", "bf16": "bf16-mixed", "bf16-mixed": "bf16-mixed",
    "16-true": "16-true", "bf16-true": "bf16-true",
}  # fmt: skip


def make_precision(precision: str | int | None, device_type: str) -> Precision:
    """Build the plugin for the Trainer's ``precision`` argument.

    Raises:
        MisconfigurationException: an unknown name; the message lists those that there are.
    """
    name = _NAMES.get(None if precision is None else str(precision))
    if name is None:
        raise MisconfigurationException(
            f"precision={precision!r} is not supported. Use one of 32, 64, '16-mixed', 'bf16-mixed', '16-true',"
            " 'bf16-true'."
        )
    return MixedPrecision(name, device_type) if name.endswith("mixed") else Precision(name)
