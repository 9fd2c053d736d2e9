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
        """Called with what `predict_step` returned.

        `batch_indices` is None: loaders yield batches, not the indices of their samples. A dataset that is to know them
        returns them with the sample.
        """
        raise NotImplementedError

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: Module, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Called with all predictions, a list per loader where there are several. `batch_indices` is empty."""
        raise NotImplementedError

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.interval in ("batch", "batch_and_epoch"):
            self.write_on_batch_end(trainer, pl_module, outputs, None, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self.interval in ("epoch", "batch_and_epoch"):
            per_loader = trainer.evaluation_loops["predict"].predictions
            predictions = per_loader[0] if len(per_loader) == 1 else per_loader
            self.write_on_epoch_end(trainer, pl_module, predictions, [])
