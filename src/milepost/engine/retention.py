"""Which checkpoints to keep. Pure: no I/O, no torch; paths are opaque strings and scores are floats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Mode = Literal["min", "max"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint that competes for a place.

    Attributes:
        path: where it is, or will be.
        score: the monitored value; None where nothing is monitored, NaN where the value is unusable.
        step: ``global_step`` it was taken at.
    """

    path: str
    score: float | None = None
    step: int = 0

    @property
    def scored(self) -> bool:
        """Whether the score can be compared."""
        return self.score is not None and not math.isnan(self.score)


@dataclass(frozen=True, slots=True)
class Retention:
    """Keep the `k` best (-1: all, 0: none).

    A comparable score beats none and NaN. Of equal scores the earlier wins, so that a plateau does not rewrite files;
    of entries without a comparable score the newest wins, so that a run whose metric is broken keeps its latest state.
    """

    k: int = 1
    mode: Mode = "min"

    def order(self, entries: Iterable[Entry]) -> list[Entry]:
        """`entries` (oldest first) with the best first."""
        listed = list(entries)
        sign = 1.0 if self.mode == "min" else -1.0
        scored = sorted((e for e in listed if e.scored), key=lambda e: sign * (e.score or 0.0))
        return scored + [e for e in reversed(listed) if not e.scored]

    def retain(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        """Those of `entries` (oldest first) that stay, in the same order."""
        if self.k == -1:
            return tuple(entries)
        kept = self.order(entries)[: self.k]
        return tuple(e for e in entries if e in kept)

    def admits(self, entries: Sequence[Entry], score: float | None) -> bool:
        """Whether a new checkpoint with `score` would stay among `entries`."""
        candidate = Entry(path="\0candidate", score=score)
        return candidate.path in {e.path for e in self.retain([*entries, candidate])}


@dataclass(frozen=True, slots=True)
class Change:
    """What the commit of one save does to a `Catalog`: a new entry, last or crash file, or several of these."""

    entry: Entry | None = None
    last: str = ""
    crash: str = ""


@dataclass(frozen=True, slots=True)
class Catalog:
    """The checkpoints of one checkpointer at one moment.

    Attributes:
        entries: those that hold a place among the best, oldest first.
        last: the newest state, or "".
        crash: what the latest exception left, or "".
        elsewhere: the best one that an earlier run left in another directory: it may be the best, takes no place.
    """

    entries: tuple[Entry, ...] = ()
    last: str = ""
    crash: str = ""
    elsewhere: Entry | None = None

    def after(self, change: Change, policy: Retention) -> Catalog:
        """The catalog once the save behind `change` is committed and `policy` has been applied."""
        entries = self.entries
        if change.entry is not None:
            others = tuple(e for e in entries if e.path != change.entry.path)
            entries = policy.retain((*others, change.entry))
        return replace(self, entries=entries, last=change.last or self.last, crash=change.crash)

    def paths(self) -> frozenset[str]:
        """Every file that this catalog owns."""
        return frozenset(p for p in (*(e.path for e in self.entries), self.last, self.crash) if p)

    def best(self, policy: Retention) -> Entry | None:
        """The best entry, or None where there is none."""
        known = self.entries if self.elsewhere is None else (self.elsewhere, *self.entries)
        ranked = policy.order(known)
        return ranked[0] if ranked else None

    def worst(self, policy: Retention) -> Entry | None:
        """The entry that would be dropped next, or None where there is none."""
        ranked = policy.order(self.entries)
        return ranked[-1] if ranked else None


def obsolete(before: Catalog, after: Catalog) -> list[str]:
    """Paths that `before` owns and `after` does not, in a stable order: what retention deletes."""
    return sorted(before.paths() - after.paths())
