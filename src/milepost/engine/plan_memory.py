"""Plans kept from save to save: flattening names and laying out 450 tensors takes as long as copying 50 MB of them."""

from __future__ import annotations

from collections import deque
from typing import Any

from milepost.engine.planner import plan_groups
from milepost.engine.requests import BlobPlan
from milepost.engine.state import Flattened

_KEPT = 4
"""A run saves few structures in turn: with the optimizer and without it, say."""


class PlanMemory:
    """The plans of the structures that were saved last. It holds no tensor."""

    def __init__(self) -> None:
        self._known: deque[tuple[Any, list[BlobPlan]]] = deque(maxlen=_KEPT)

    def plans(self, flattened: Flattened) -> list[BlobPlan]:
        """The plans of a state, with its tensors; made anew only where its structure is."""
        structure = flattened.structure
        plans = next((plans for known, plans in self._known if known == structure), None)
        if plans is None:
            plans = plan_groups(flattened.leaves)
            self._known.appendleft((structure, plans))
        return [plan.bound(flattened.tensors) for plan in plans]
