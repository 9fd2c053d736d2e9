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


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """What a checkpoint gets of a learning-rate scheduler.

    torch 2.9 puts the function that SWALR anneals by among its state, which is no data; later ones leave it out, and
    it is made anew from the strategy's name.
    """
    state: dict[str, Any] = scheduler.state_dict()
    if callable(state.get("anneal_func")):
        state = {name: value for name, value in state.items() if name != "anneal_func"}
    return state
