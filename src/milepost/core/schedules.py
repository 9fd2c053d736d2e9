"""A learning-rate scheduler together with when it moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class SchedulerConfig:
    """One scheduler, and when it moves. Fields are the keys that `configure_optimizers` may give."""

    scheduler: Any
    name: str | None = None
    interval: str = "epoch"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: str | None = None
    strict: bool = True
