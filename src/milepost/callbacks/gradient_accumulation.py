"""Change how many batches make one optimizer step as training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from milepost.callbacks.callback import Callback
from milepost.errors import MisconfigurationException

if TYPE_CHECKING:
    from milepost.trainer.module import Module
    from milepost.trainer.trainer import Trainer


class GradientAccumulationScheduler(Callback):
    """Sets ``trainer.accumulate_grad_batches`` by epoch.

    Args:
        scheduling: from which epoch (counted from 0) how many batches are accumulated: ``{0: 8, 4: 1}``.
    """

    def __init__(self, scheduling: dict[int, int]) -> None:
        if not scheduling:
            raise MisconfigurationException("scheduling is empty; give {epoch: batches}, such as {0: 8, 4: 1}")
        for epoch, batches in scheduling.items():
            if not isinstance(epoch, int) or epoch < 0 or not isinstance(batches, int) or batches < 1:
                raise MisconfigurationException(
                    f"scheduling holds {epoch!r}: {batches!r}; an epoch is an integer from 0, batches one from 1"
                )
        self.scheduling = {0: 1, **scheduling}

    def going_to_accumulate_grad_batches(self) -> bool:
        """Whether any epoch accumulates more than one batch."""
        return any(batches > 1 for batches in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """Batches per optimizer step in `epoch`."""
        return self.scheduling[max(start for start in self.scheduling if start <= epoch)]

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "GradientAccumulationScheduler needs automatic optimization: in manual optimization the module decides "
                "itself when to step. Remove the callback."
            )
        # A run that is resumed midway through an epoch has no on_train_epoch_start for it.
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)
