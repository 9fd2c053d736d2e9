"""Number formats where DeepSpeed trains: its engine casts the model and scales the loss, the batches are cast here."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from milepost.errors import MisconfigurationException
from milepost.precision.precision import Precision

_DTYPES = {
    "32": torch.float32, "32-true": torch.float32, "16": torch.float16, "16-mixed": torch.float16,
    "16-true": torch.float16, "bf16": torch.bfloat16, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16,
}  # fmt: skip


class DeepSpeedPrecision(Precision):
    """The model in `precision`, with masters in fp32 that DeepSpeed keeps.

    Raises:
        MisconfigurationException: a precision that DeepSpeed does not train in.
    """

    def __init__(self, precision: str | int | None = None) -> None:
        name = "32-true" if precision is None else str(precision)
        if name not in _DTYPES:
            raise MisconfigurationException(
                f"precision={precision!r} is not supported with DeepSpeed. Use one of {', '.join(map(repr, _DTYPES))}."
            )
        super().__init__("32-true")
        self.precision = name
        self.dtype = _DTYPES[name]

    def init_context(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        return module

    def convert_input(self, batch: Any) -> Any:
        if self.dtype is torch.float32:
            return batch
        from milepost.trainer.transfer import map_tensors

        return map_tensors(batch, lambda t: t.to(self.dtype) if t.is_floating_point() else t)

    def step(self, optimizer: Any, closure: Any, before_step: Any, **kwargs: Any) -> Any:
        """DeepSpeed steps with what the closure has left in it, so that runs once, and outside of the step."""
        result = closure()
        before_step()
        optimizer.step(**kwargs)
        return result

    def clip_gradients(self, optimizer: Any, limit: float, algorithm: str) -> None:
        """DeepSpeed clips the norm over all ranks in its step, as its configuration was told."""
        if algorithm == "value":
            raise MisconfigurationException(
                "gradient_clip_algorithm='value' cannot be had with DeepSpeed, which clips the norm. Use 'norm'."
            )
