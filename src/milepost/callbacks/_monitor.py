"""The monitored value: whether it is true for this very step, and what to do when nobody logs it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

_BUILTIN = frozenset({"epoch", "step"})


class Monitor:
    """What a checkpointer knows of the metric it ranks by.

    Attributes:
        name: the metric, or None to rank by recency.
        unknown: it turned out that nothing of that name is logged: the decision no longer waits for it.
        validated: a validation has ended in this run, so whatever validation logs has been seen.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.begin()

    def begin(self) -> None:
        """A run begins."""
        self.unknown = self.validated = False

    def decidable(self, trainer: Any) -> bool:
        """Whether the state of this step can be ranked now."""
        return self._always() or self.unknown or is_fresh(trainer, str(self.name))

    def score(self, trainer: Any, metrics: Mapping[str, Any]) -> float | None:
        """The value in `metrics` if it is of this step, NaN if it is not, None where nothing is monitored."""
        if self.name is None:
            return None
        return float(metrics[self.name]) if self._always() or is_fresh(trainer, self.name) else math.nan

    def check(self, trainer: Any) -> bool:
        """Called when an epoch ends: whether it has just turned out that nothing of the name is logged. Warns."""
        metrics = trainer.callback_metrics
        if self._always() or self.name in metrics:
            self.unknown = False
            return False
        expects_validation = sum(trainer.num_val_batches or [0]) > 0
        if self.unknown or (expects_validation and not self.validated):
            return False
        self.unknown = True
        warnings.warn(
            f"ModelCheckpoint(monitor={self.name!r}): no such metric was logged. Available: "
            f"{', '.join(sorted(metrics)) or 'none'}. Until it appears checkpoints are kept by recency; "
            f"log it with self.log({self.name!r}, ...) or correct the name",
            stacklevel=3,
        )
        return True

    def _always(self) -> bool:
        return self.name is None or self.name in _BUILTIN


def is_fresh(trainer: Any, monitor: str) -> bool:
    """Whether the value of `monitor` belongs to the state of this very step.

    What ``training_step`` logs on its way to step N is recorded under N - 1, and is as much of step N as training
    values ever are; what validation logged one step ago is not.
    """
    logged = trainer.metric_steps.get(monitor)
    if logged is None or logged == trainer.global_step:
        return logged is not None
    if logged != trainer.global_step - 1:
        return False
    return bool(trainer.metrics.of_training_step(monitor))
