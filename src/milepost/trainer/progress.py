"""How far a run has come: counters in the shape that Lightning's checkpoints have under ``loops``."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Phase(StrEnum):
    """The points of the loop at which a checkpoint can be written, and from which a resumed run goes on."""

    BETWEEN_EPOCHS = "between_epochs"  # before the first epoch, or after the last hook of one
    EPOCH_START = "epoch_start"  # in on_train_epoch_start
    BATCH_END = "batch_end"  # in on_train_batch_end: validation that is due at this batch is still to come
    VALIDATED = "validated"  # in on_validation_end: plateau schedulers of this batch are still to come
    BATCH_DONE = "batch_done"  # the batch and its validation are over
    EPOCH_END = "epoch_end"  # in on_train_epoch_end: plateau schedulers are still to come


@dataclass
class Counts:
    """Events made ready, started, processed and completed, in this order."""

    ready: int = 0
    completed: int = 0
    started: int = 0
    processed: int = 0

    def as_dict(self, *names: str) -> dict[str, int]:
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, int]) -> None:
        for name, value in state.items():
            setattr(self, name, int(value))


_ALL = ("ready", "completed", "started", "processed")


@dataclass
class Progress:
    """Counts of the whole run and of the current epoch."""

    total: Counts = field(default_factory=Counts)
    current: Counts = field(default_factory=Counts)
    is_last_batch: bool = False

    def add(self, name: str) -> None:
        setattr(self.total, name, getattr(self.total, name) + 1)
        setattr(self.current, name, getattr(self.current, name) + 1)

    def reset_current(self) -> None:
        self.current = Counts()
        self.is_last_batch = False

    def forget_unfinished(self) -> None:
        """Count what was made ready and started, but not processed, as not begun."""
        for counts in (self.total, self.current):
            counts.ready = counts.started = counts.processed
        self.is_last_batch = False

    def state_dict(self, *names: str, last: bool = False) -> dict[str, Any]:
        names = names or _ALL
        state: dict[str, Any] = {"total": self.total.as_dict(*names), "current": self.current.as_dict(*names)}
        if last:
            state["is_last_batch"] = self.is_last_batch
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total.load(state["total"])
        self.current.load(state["current"])
        self.is_last_batch = bool(state.get("is_last_batch", False))


@dataclass
class FitProgress:
    """All counters of ``fit``."""

    epoch: Progress = field(default_factory=Progress)
    batch: Progress = field(default_factory=Progress)
    optimizer_step: Progress = field(default_factory=Progress)
    zero_grad: Progress = field(default_factory=Progress)
    manual_step: Progress = field(default_factory=Progress)
    scheduler: Progress = field(default_factory=Progress)
    validation_batch: Progress = field(default_factory=Progress)
    batches_that_stepped: int = 0

    def state_dict(self) -> dict[str, Any]:
        """The value of ``checkpoint["loops"]["fit_loop"]``, keyed as Lightning 2.x reads it."""
        return {
            "state_dict": {},
            "epoch_loop.state_dict": {"_batches_that_stepped": self.batches_that_stepped},
            "epoch_loop.batch_progress": self.batch.state_dict(last=True),
            "epoch_loop.scheduler_progress": self.scheduler.state_dict("ready", "completed"),
            "epoch_loop.automatic_optimization.state_dict": {},
            "epoch_loop.automatic_optimization.optim_progress": {
                "optimizer": {
                    "step": self.optimizer_step.state_dict("ready", "completed"),
                    "zero_grad": self.zero_grad.state_dict("ready", "completed", "started"),
                }
            },
            "epoch_loop.manual_optimization.state_dict": {},
            "epoch_loop.manual_optimization.optim_step_progress": self.manual_step.state_dict("ready", "completed"),
            "epoch_loop.val_loop.state_dict": {},
            "epoch_loop.val_loop.batch_progress": self.validation_batch.state_dict(last=True),
            "epoch_progress": self.epoch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch.load_state_dict(state["epoch_progress"])
        self.batch.load_state_dict(state["epoch_loop.batch_progress"])
        self.scheduler.load_state_dict(state["epoch_loop.scheduler_progress"])
        optimizer = state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        self.optimizer_step.load_state_dict(optimizer["step"])
        self.zero_grad.load_state_dict(optimizer["zero_grad"])
        self.manual_step.load_state_dict(state["epoch_loop.manual_optimization.optim_step_progress"])
        self.validation_batch.load_state_dict(state["epoch_loop.val_loop.batch_progress"])
        self.batches_that_stepped = int(state["epoch_loop.state_dict"].get("_batches_that_stepped", 0))

    @property
    def validation_unfinished(self) -> bool:
        """Whether a validation was cut short: a batch of it was begun, and it was not the last or is not completed."""
        batch = self.validation_batch
        return batch.current.ready > 0 and not (batch.is_last_batch and batch.current.completed == batch.current.ready)

    def inferred_phase(self) -> Phase:
        """Where a checkpoint stands that does not say so itself: one that Lightning wrote.

        Lightning counts a batch or an epoch as completed only after the hooks in which checkpoints are written.
        """
        epoch, batch = self.epoch.current, self.batch.current
        if epoch.ready == epoch.processed:
            return Phase.BETWEEN_EPOCHS if epoch.completed == epoch.processed else Phase.EPOCH_END
        if epoch.started < epoch.ready:
            return Phase.EPOCH_START
        if batch.completed < batch.processed or self.validation_unfinished:
            return Phase.BATCH_END  # cut short, a validation is done again from its start
        manual = self.manual_step.total.completed > 0
        steps = (self.batch if manual else self.optimizer_step).total.completed
        return Phase.VALIDATED if self.batches_that_stepped < steps else Phase.BATCH_DONE


def evaluation_state() -> dict[str, Any]:
    """The state of a validate, test or predict loop as Lightning's loaders expect it in every checkpoint."""
    return {"state_dict": {}, "batch_progress": Progress().state_dict(last=True)}


def prediction_state() -> dict[str, Any]:
    return {"state_dict": {}, "batch_progress": Progress().state_dict()}
