"""Write predictions out as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from milepost.callbacks.callback import Callback
from milepost.errors import MisconfigurationException

if TYPE_CHECKING:
    from milepost.trainer.module import Module
    from milepost.trainer.trainer import Trainer


class BasePredictionWriter(Callback):
    """Derive from this and override `write_on_batch_end`, `write_on_epoch_end` or both.

    Args:
        write_interval: ``"batch"``, ``"epoch"`` or ``"batch_and_epoch"``: which of the two is called.
    """

    def __init__(self, write_interval: str = "batch") -> None:
        if write_interval not in ("batch", "epoch", "batch_and_epoch"):
            raise MisconfigurationException(
                f"write_interval is {write_interval!r}; give 'batch', 'epoch' or 'batch_and_epoch'"
            )
        self.interval = write_interval

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Called with what `predict_step` returned, and the indices of the batch's samples where they are known."""
        raise NotImplementedError

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: Module, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Called with all predictions, a list per loader where there are several, and the indices in the same form."""
        raise NotImplementedError

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.interval in ("batch", "batch_and_epoch"):
            indices = getattr(_loop(trainer), "current_batch_indices", None)
            self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self.interval in ("epoch", "batch_and_epoch"):
            loop = _loop(trainer)
            self.write_on_epoch_end(
                trainer, pl_module, getattr(loop, "predictions", []), getattr(loop, "epoch_batch_indices", [])
            )


def _loop(trainer: Trainer) -> Any:
    return getattr(trainer, "predict_loop", None)
