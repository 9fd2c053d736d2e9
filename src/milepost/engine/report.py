"""What a restore took, and what it left as it was. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["restored", "restored in part", "left out", "not in the checkpoint"]


@dataclass
class RestoreReport:
    """What became of each part of the state that was given to `Checkpointer.restore`.

    Attributes:
        step: of the checkpoint.
        parts: by the state's key.
        missing: key paths of the state for which the checkpoint has nothing. They are as they were.
        unused: key paths in the checkpoint for which the state has no place.
        unfit: by key path, why something was not taken that is there. It is as it was.
    """

    step: int
    parts: dict[str, Outcome] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    unfit: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all that was given has been restored."""
        return all(outcome == "restored" for outcome in self.parts.values())
