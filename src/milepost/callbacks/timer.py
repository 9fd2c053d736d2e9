"""Measure the time of a run, over restarts, and end it in time."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from milepost import _distributed
from milepost.callbacks.callback import Callback
from milepost.errors import MisconfigurationException

if TYPE_CHECKING:
    from milepost.trainer.module import Module
    from milepost.trainer.trainer import Trainer

_STAGES = ("train", "validate", "test", "predict")


class Timer(Callback):
    """Measures training, validation and test, and sets ``trainer.should_stop`` when training has used `duration`.

    Time spent before a restart counts: it is in the checkpoint.

    Args:
        duration: a timedelta, its arguments as a dict, or text in the form ``"DD:HH:MM:SS"``; None only measures.
        interval: look at the clock after each ``"step"`` or each ``"epoch"``.
        verbose: print when the time is up.
        clock: seconds, from any origin.
    """

    def __init__(
        self,
        duration: str | timedelta | dict[str, int] | None = None,
        interval: str = "step",
        verbose: bool = True,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if interval not in ("step", "epoch"):
            raise MisconfigurationException(f"interval is {interval!r}; give 'step' or 'epoch'")
        self._duration = None if duration is None else _seconds(duration)
        self._interval = interval
        self._verbose = verbose
        self._clock = clock
        self._start: dict[str, float] = {}
        self._end: dict[str, float] = {}
        self._before = dict.fromkeys(_STAGES, 0.0)  # seconds used by the runs that this one resumes

    def start_time(self, stage: str = "train") -> float | None:
        """Reading of the clock when `stage` began, in seconds."""
        return self._start.get(stage)

    def end_time(self, stage: str = "train") -> float | None:
        """Reading of the clock when `stage` ended, in seconds."""
        return self._end.get(stage)

    def time_elapsed(self, stage: str = "train") -> float:
        """Seconds spent in `stage`, those before a restart included."""
        start = self._start.get(stage)
        running = 0.0 if start is None else self._end.get(stage, self._clock()) - start
        return self._before[stage] + running

    def time_remaining(self, stage: str = "train") -> float | None:
        """Seconds left of the duration, or None when there is none."""
        return None if self._duration is None else self._duration - self.time_elapsed(stage)

    def state_dict(self) -> dict[str, Any]:
        return {"time_elapsed": {stage: self.time_elapsed(stage) for stage in _STAGES}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before.update(state_dict["time_elapsed"])
        self._start.clear()
        self._end.clear()

    def _begin(self, stage: str) -> None:
        self._before[stage] = self.time_elapsed(stage)
        self._start[stage] = self._clock()
        self._end.pop(stage, None)

    def _finish(self, stage: str) -> None:
        if stage in self._start:
            self._end[stage] = self._clock()

    def _check(self, trainer: Trainer) -> None:
        remaining = self.time_remaining()
        if remaining is None:
            return
        # Rank 0 decides: clocks differ, and a rank that stops alone leaves the others waiting.
        over = _distributed.broadcast_object(remaining <= 0)
        if over and self._verbose and trainer.is_global_zero and not trainer.should_stop:
            print(f"Time limit reached. Elapsed time is {timedelta(seconds=int(self.time_elapsed()))}. Stopping.")
        trainer.should_stop = trainer.should_stop or over

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._check(trainer)  # the time may have been used up before the restart

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._begin("train")

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._finish("train")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._interval == "step":
            self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._interval == "epoch":
            self._check(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._begin("validate")

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._finish("validate")

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._begin("test")

    def on_test_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._finish("test")

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._begin("predict")

    def on_predict_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._finish("predict")


def _seconds(duration: str | timedelta | dict[str, int]) -> float:
    if isinstance(duration, timedelta):
        return duration.total_seconds()
    if isinstance(duration, dict):
        return timedelta(**duration).total_seconds()
    parts = duration.strip().split(":")
    if len(parts) != 4 or not all(part.isdigit() for part in parts):
        raise MisconfigurationException(f"duration is {duration!r}; give text in the form DD:HH:MM:SS")
    days, hours, minutes, seconds = map(int, parts)
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds()
