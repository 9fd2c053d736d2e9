"""When a checkpointer fires. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from milepost.errors import MisconfigurationException


@dataclass(frozen=True, slots=True)
class Trigger:
    """At most one of the three is set; 0 or None is off.

    Attributes:
        steps: every so many optimizer steps.
        epochs: every so many epochs.
        interval: whenever so much time has passed.
    """

    steps: int = 0
    epochs: int = 0
    interval: timedelta | None = None

    @classmethod
    def resolve(cls, steps: int | None, epochs: int | None, interval: timedelta | None) -> Trigger:
        """The trigger that the three user arguments mean; without any of them every epoch.

        Raises:
            MisconfigurationException: one is negative, or more than one is set.
        """
        for name, value in (("every_n_train_steps", steps), ("every_n_epochs", epochs)):
            if value is not None and value < 0:
                raise MisconfigurationException(f"{name}={value} is negative: give a positive number, or 0 for never")
        if steps is None and epochs is None and interval is None:
            return cls(epochs=1)
        if sum((bool(steps), bool(epochs), interval is not None)) > 1:
            raise MisconfigurationException(
                f"every_n_train_steps={steps}, every_n_epochs={epochs} and train_time_interval={interval} exclude each "
                "other: set one of them, or use one ModelCheckpoint for each"
            )
        return cls(steps=steps or 0, epochs=epochs or 0, interval=interval)

    def at_step(self, step: int) -> bool:
        """Whether `step` (``global_step``, the number of optimizer steps taken) is due."""
        return self.steps > 0 and step > 0 and step % self.steps == 0

    def at_epoch(self, epoch: int) -> bool:
        """Whether the end of `epoch` (counted from 0) is due."""
        return self.epochs > 0 and (epoch + 1) % self.epochs == 0

    @property
    def never(self) -> bool:
        """Whether nothing triggers a save."""
        return self == Trigger()

    def after(self, seconds: float) -> bool:
        """Whether a save is due `seconds` after the one before."""
        return self.interval is not None and seconds >= self.interval.total_seconds()


@dataclass(slots=True)
class Done:
    """Up to which ``global_step`` a checkpointer has done what; 0 where it is to be done at the next occasion.

    Attributes:
        fired: the step or time trigger has fired.
        ranked: whether the state is among the best has been decided.
        last: the last holds it.
        saved: a file holds it.
    """

    fired: int = 0
    ranked: int = 0
    last: int = 0
    saved: int = 0

    @classmethod
    def resumed(cls, step: int, *, has_last: bool) -> Done:
        """At the start of a run: what was resumed from is saved, and its trigger has fired."""
        return cls(fired=step, last=step if has_last else 0, saved=step)

    def forget_saves(self) -> None:
        """A save has failed: the next occasion is to be taken."""
        self.last = self.saved = 0


def idle(trainer: Any) -> bool:
    """Whether this is no time to save: a trial, an evaluation, the sanity check."""
    return bool(trainer.fast_dev_run) or trainer.state.fn != "fit" or trainer.sanity_checking


def saves_at_train_epoch_end(trainer: Any, chosen: bool | None) -> bool:
    """Whether the epoch trigger acts at the end of the training epoch rather than at the end of validation."""
    if chosen is not None:
        return chosen
    interval = trainer.val_check_interval
    if isinstance(interval, (str, dict, timedelta)):
        return False
    if trainer.check_val_every_n_epoch != 1:
        return False
    if sum(trainer.num_val_batches or [0]) == 0:
        return True
    return isinstance(interval, float) and interval == 1.0
