"""Which checkpoints to keep. Pure: no I/O, no clock, no torch; paths are opaque strings, scores and times floats.

A policy is a union of rules, written with ``|``: a checkpoint stays while any rule wants it. ::

    KeepBest(3) | KeepNewest(2) | KeepEvery(10_000) | KeepLadder((timedelta(hours=1), timedelta(days=1)))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal

from milepost.errors import MisconfigurationException

Mode = Literal["min", "max"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint that competes for a place.

    Attributes:
        path: where it is, or will be.
        score: the monitored value; None where nothing is monitored, NaN where the value is unusable.
        step: ``global_step`` it was taken at.
        time: when it was asked for, in seconds since the epoch; 0 where that is not known.
    """

    path: str
    score: float | None = None
    step: int = 0
    time: float = 0.0

    @property
    def scored(self) -> bool:
        """Whether the score can be compared."""
        return self.score is not None and not math.isnan(self.score)


class Rule:
    """One reason to keep checkpoints. Derive from this for a rule of your own; ``|`` unites rules."""

    def select(self, entries: Sequence[Entry], ranked: Sequence[Entry]) -> Iterable[Entry]:
        """Those that stay of `entries` (oldest first), which `ranked` lists too, the best first."""
        raise NotImplementedError

    def parts(self) -> tuple[Rule, ...]:
        """The rules that this one is made of."""
        return (self,)

    def __or__(self, other: Rule) -> Rule:
        return AnyOf((*self.parts(), *other.parts()))


@dataclass(frozen=True, slots=True)
class AnyOf(Rule):
    """Keep what any of `rules` keeps; without rules nothing."""

    rules: tuple[Rule, ...] = ()

    def select(self, entries: Sequence[Entry], ranked: Sequence[Entry]) -> Iterable[Entry]:
        return [entry for rule in self.rules for entry in rule.select(entries, ranked)]

    def parts(self) -> tuple[Rule, ...]:
        return self.rules


@dataclass(frozen=True, slots=True)
class KeepBest(Rule):
    """Keep the `k` best by the monitored value (-1: all, 0: none)."""

    k: int = 1

    def __post_init__(self) -> None:
        if self.k < -1:
            raise MisconfigurationException(f"k={self.k} must be -1 (all), 0 (none) or positive")

    def select(self, entries: Sequence[Entry], ranked: Sequence[Entry]) -> Iterable[Entry]:
        return ranked if self.k == -1 else ranked[: self.k]


@dataclass(frozen=True, slots=True)
class KeepNewest(Rule):
    """Keep the `n` newest."""

    n: int = 1

    def __post_init__(self) -> None:
        _positive("n", self.n)

    def select(self, entries: Sequence[Entry], ranked: Sequence[Entry]) -> Iterable[Entry]:
        return entries[-self.n :]


@dataclass(frozen=True, slots=True)
class KeepEvery(Rule):
    """Keep for good the first checkpoint at or after each multiple of `steps` optimizer steps."""

    steps: int

    def __post_init__(self) -> None:
        _positive("steps", self.steps)

    def select(self, entries: Sequence[Entry], ranked: Sequence[Entry]) -> Iterable[Entry]:
        due = [entry for entry in entries if entry.step >= self.steps]
        return _first_of_each(due, [entry.step // self.steps for entry in due])


@dataclass(frozen=True, slots=True, init=False)
class KeepLadder(Rule):
    """Keep checkpoints ever further apart the older they are.

    Each rung ``(spacing, age)`` keeps the first checkpoint in each span of `spacing` for those not older than `age`
    before the newest one. An hour's rung for a day under a day's rung for a month keeps at most 24 + 30. A spacing
    that divides the next one's makes every checkpoint of a higher rung one of the lower rung too, so that none is
    dropped before it is old enough for the rung that would keep it.
    """

    rungs: tuple[tuple[timedelta, timedelta], ...]

    def __init__(self, *rungs: tuple[timedelta, timedelta]) -> None:
        for spacing, age in rungs:
            if spacing <= timedelta() or age < spacing:
                raise MisconfigurationException(
                    f"the rung ({spacing}, {age}) must have a positive spacing and an age that is not below it"
                )
        object.__setattr__(self, "rungs", rungs)

    def select(self, entries: Sequence[Entry], ranked: Sequence[Entry]) -> Iterable[Entry]:
        newest = max((entry.time for entry in entries), default=0.0)
        kept: list[Entry] = []
        for spacing, age in self.rungs:
            seconds = spacing.total_seconds()
            first = _first_of_each(entries, [math.floor(entry.time / seconds) for entry in entries])
            kept += [entry for entry in first if newest - entry.time <= age.total_seconds()]
        return kept


@dataclass(frozen=True, slots=True)
class Retention:
    """A rule, and which end of the monitored value is the better one.

    A comparable score beats none and NaN. Of equal scores the earlier wins, so that a plateau does not rewrite files;
    of entries without a comparable score the newest wins, so that a run whose metric is broken keeps its latest state.
    """

    rule: Rule = KeepBest(1)
    mode: Mode = "min"

    @property
    def k(self) -> int:
        """How many of the best are kept; -1 where no rule limits them."""
        return next((part.k for part in self.rule.parts() if isinstance(part, KeepBest)), -1)

    @property
    def unranked(self) -> Retention:
        """What is kept for other reasons than being among the best."""
        others = tuple(part for part in self.rule.parts() if not isinstance(part, KeepBest))
        return replace(self, rule=AnyOf(others))

    def order(self, entries: Iterable[Entry]) -> list[Entry]:
        """`entries` (oldest first) with the best first."""
        listed = list(entries)
        sign = 1.0 if self.mode == "min" else -1.0
        scored = sorted((e for e in listed if e.scored), key=lambda e: sign * (e.score or 0.0))
        return scored + [e for e in reversed(listed) if not e.scored]

    def retain(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        """Those of `entries` (oldest first) that stay, in the same order."""
        kept = {entry.path for entry in self.rule.select(entries, self.order(entries))}
        return tuple(e for e in entries if e.path in kept)

    def admits(self, entries: Sequence[Entry], candidate: Entry) -> bool:
        """Whether `candidate`, the newest, would stay among `entries`."""
        return candidate in self.retain([*entries, candidate])


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
        entries: those that hold a place, oldest first.
        last: the newest state, or "".
        crash: what the latest exception left, or "".
        elsewhere: the best one that an earlier run left in another directory: it may be the best, takes no place.
    """

    entries: tuple[Entry, ...] = ()
    last: str = ""
    crash: str = ""
    elsewhere: Entry | None = None

    def after(self, change: Change, policy: Retention) -> Catalog:
        """The catalog once the save behind `change` is committed and `policy` has been applied.

        The new entry takes the place of one under its path, and of one of its step that has no score.
        """
        entries, new = self.entries, change.entry
        if new is not None:
            others = (e for e in entries if e.path != new.path and not (e.step == new.step and _unusable(e)))
            entries = policy.retain((*others, new))
        return replace(self, entries=entries, last=change.last or self.last, crash=change.crash)

    def paths(self) -> frozenset[str]:
        """Every file that this catalog owns."""
        return frozenset(p for p in (*(e.path for e in self.entries), self.last, self.crash) if p)

    def best(self, policy: Retention) -> Entry | None:
        """The best entry, or None where there is none."""
        known = self.entries if self.elsewhere is None else (self.elsewhere, *self.entries)
        ranked = policy.order(known)
        return ranked[0] if ranked else None

    def kth(self, policy: Retention) -> Entry | None:
        """The last of the k best, which a better one would push out; None while there are fewer than k."""
        ranked = policy.order(self.entries)
        return ranked[policy.k - 1] if 0 < policy.k <= len(ranked) else None


def obsolete(before: Catalog, after: Catalog) -> list[str]:
    """Paths that `before` owns and `after` does not, in a stable order: what retention deletes."""
    return sorted(before.paths() - after.paths())


def _unusable(entry: Entry) -> bool:
    return entry.score is not None and math.isnan(entry.score)


def _first_of_each(entries: Sequence[Entry], buckets: Sequence[int]) -> list[Entry]:
    first: dict[int, Entry] = {}
    for entry, bucket in zip(entries, buckets, strict=True):
        first.setdefault(bucket, entry)
    return list(first.values())


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise MisconfigurationException(f"{name}={value} must be at least 1")
