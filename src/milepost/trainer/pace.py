"""When what is due: the end of gradient accumulation, a validation, the end of an epoch and of the run."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from milepost.errors import MisconfigurationException
from milepost.trainer.progress import FitProgress

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer


class Pace:
    """Answers from the counts in `progress` and the Trainer's limits; changes neither."""

    def __init__(self, trainer: Trainer, progress: FitProgress) -> None:
        self.trainer = trainer
        self.progress = progress
        self.batches: int | float = math.inf
        self.val_check_batch: int | float = math.inf
        self._last_validation_time = 0.0

    def set_batches(self, batches: int | float) -> None:
        """The stream is there: an epoch has as many batches, `inf` where that is not known."""
        self.batches = batches
        self.val_check_batch = self._val_check_batch(batches)

    def note_validation(self) -> None:
        """A validation has ended, or training begins: an interval given as a time counts from here."""
        self._last_validation_time = time.monotonic()

    @property
    def accumulating(self) -> bool:
        """Whether the current batch only adds to the gradients."""
        boundary = self.progress.batch.current.ready % self.trainer.accumulate_grad_batches == 0
        return not boundary and not self.last_batch_reached

    @property
    def last_batch_reached(self) -> bool:
        """Whether the batch under way, or the one just run, is the last of its epoch."""
        return self.progress.batch.current.ready == self.batches or self.progress.batch.is_last_batch

    @property
    def global_step(self) -> int:
        """Optimizer steps taken."""
        module = self.trainer.lightning_module
        manual = module is not None and not module.automatic_optimization
        return (self.progress.manual_step if manual else self.progress.optimizer_step).total.completed

    @property
    def can_stop_early(self) -> bool:
        """Whether the least number of epochs and steps has been reached."""
        trainer = self.trainer
        return self.progress.epoch.current.processed >= (trainer.min_epochs or 0) and self.global_step >= (
            trainer.min_steps or 0
        )

    def _steps_done(self) -> bool:
        return self.trainer.max_steps != -1 and self.global_step >= self.trainer.max_steps

    def done(self) -> bool:
        """Whether the run is over."""
        trainer = self.trainer
        epochs = (
            trainer.max_epochs is not None
            and trainer.max_epochs != -1
            and self.progress.epoch.current.processed >= trainer.max_epochs
        )
        return self._steps_done() or epochs or (trainer.should_stop and self.can_stop_early)

    def epoch_done(self) -> bool:
        """Whether the epoch has no further batch."""
        trainer = self.trainer
        if self._steps_done() or (self.last_batch_reached and self.progress.batch.current.ready > 0):
            return True
        if trainer.should_stop and not self.can_stop_early:
            trainer.warn_once(
                f"A stop was asked for, but min_epochs={trainer.min_epochs!r} or min_steps={trainer.min_steps!r} is not"
                " met yet: training goes on."
            )
        return trainer.should_stop and self.can_stop_early

    def _validation_epoch(self) -> bool:
        trainer = self.trainer
        every = trainer.check_val_every_n_epoch
        return trainer.enable_validation and (every is None or (trainer.current_epoch + 1) % every == 0)

    def validation_due(self) -> bool:
        """Whether to validate after the batch just run."""
        trainer, progress = self.trainer, self.progress
        if not self._validation_epoch():
            return False
        every = trainer.check_val_every_n_epoch
        last = self.last_batch_reached
        if trainer.should_stop and self.can_stop_early:
            return True
        if trainer.val_check_seconds is not None:
            due = time.monotonic() - self._last_validation_time >= trainer.val_check_seconds
            return trainer.strategy.broadcast(due)  # clocks differ
        if math.isinf(self.val_check_batch):
            return last
        ready = progress.batch.total.ready if every is None else progress.batch.current.ready
        return ready % int(self.val_check_batch) == 0

    def _val_check_batch(self, batches: int | float) -> int | float:
        trainer = self.trainer
        interval = trainer.val_check_interval
        if trainer.val_check_seconds is not None:
            return math.inf
        if isinstance(interval, int):
            if interval > batches and trainer.check_val_every_n_epoch is not None and trainer.enable_validation:
                raise ValueError(
                    f"val_check_interval={interval} is more than the {batches} training batches of an epoch. Use at"
                    " most that, or check_val_every_n_epoch=None to count batches across epochs, or"
                    " limit_val_batches=0 for no validation."
                )
            return interval
        if math.isinf(batches):
            if interval == 1.0:
                return math.inf
            raise MisconfigurationException(
                f"val_check_interval={interval} is a fraction of an epoch whose length is unknown. Give an int"
                " (batches) or 1.0."
            )
        return max(1, int(batches * interval))
