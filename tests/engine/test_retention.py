"""What is kept: pure policies over entries."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milepost.engine.retention import (
    AnyOf,
    Catalog,
    Change,
    Entry,
    KeepBest,
    KeepEvery,
    KeepLadder,
    KeepNewest,
    Retention,
    Rule,
    obsolete,
)
from milepost.errors import MisconfigurationException

SCORES = st.lists(st.one_of(st.none(), st.floats(allow_nan=True)), max_size=12)


def _entries(scores: list[float | None]) -> list[Entry]:
    return [Entry(f"{i}.ckpt", score, i) for i, score in enumerate(scores)]


def _new(score: float | None) -> Entry:
    return Entry("new.ckpt", score, 99)


@given(SCORES, st.integers(0, 5), st.sampled_from(["min", "max"]))
def test_the_kept_are_at_least_as_good_as_the_dropped(scores: list[float | None], k: int, mode: str) -> None:
    policy = Retention(KeepBest(k), mode)  # type: ignore[arg-type]
    entries = _entries(scores)
    kept = policy.retain(entries)
    assert len(kept) == min(k, len(entries))
    sign = 1 if mode == "min" else -1
    comparable = [sign * e.score for e in kept if e.scored]  # type: ignore[operator]
    dropped = [sign * e.score for e in entries if e.scored and e not in kept]  # type: ignore[operator]
    assert all(a <= b for a in comparable for b in dropped)
    assert not dropped or len(comparable) == len(kept), "an entry without a score displaced one that has it"


def test_a_tie_keeps_the_earlier_and_is_not_admitted() -> None:
    policy = Retention(KeepBest(1), "min")
    assert not policy.admits(_entries([0.5]), _new(0.5))
    assert policy.admits(_entries([0.5]), _new(0.4))
    assert [e.path for e in policy.retain(_entries([0.5, 0.5]))] == ["0.ckpt"]


def test_nan_is_best_only_where_there_is_nothing_else() -> None:
    policy = Retention(KeepBest(1), "max")
    assert policy.admits([], _new(math.nan))
    assert policy.admits(_entries([math.nan]), _new(-math.inf))
    assert not policy.admits(_entries([0.0]), _new(math.nan))
    assert policy.admits(_entries([math.nan]), _new(math.nan)), "the newest of those that cannot be compared"


def test_all_and_none() -> None:
    assert not Retention(KeepBest(0)).admits([], _new(1.0))
    assert Retention(KeepBest(-1)).admits(_entries([1.0] * 9), _new(math.nan))
    assert len(Retention(KeepBest(-1)).retain(_entries([1.0] * 9))) == 9


def test_without_scores_the_newest_is_the_best() -> None:
    catalog = Catalog(tuple(_entries([None, None, None])))
    best = catalog.best(Retention(KeepBest(-1)))
    assert best is not None and best.path == "2.ckpt"


def test_a_change_replaces_the_last_and_drops_what_is_not_kept() -> None:
    policy = Retention(KeepBest(1), "min")
    before = Catalog((Entry("a", 1.0),), last="old-last", crash="crash")
    after = before.after(Change(Entry("b", 0.5), last="new-last"), policy)
    assert after.paths() == {"b", "new-last"}
    assert obsolete(before, after) == ["a", "crash", "old-last"]


def test_saving_over_an_entry_of_the_same_path_keeps_one() -> None:
    after = Catalog((Entry("a", 1.0),)).after(Change(Entry("a", 0.5)), Retention(KeepBest(2), "min"))
    assert after.entries == (Entry("a", 0.5),)


def test_the_best_of_an_earlier_directory_counts_but_takes_no_place() -> None:
    policy = Retention(KeepBest(1), "min")
    catalog = Catalog((Entry("here", 0.5),), elsewhere=Entry("there", 0.1))
    best = catalog.best(policy)
    assert best is not None and best.path == "there"
    assert catalog.after(Change(Entry("new", 0.3)), policy).entries == (Entry("new", 0.3),)
    assert "there" not in catalog.paths()


def test_a_new_entry_takes_the_place_of_an_unusable_one_of_its_step() -> None:
    before = Catalog((Entry("a", 0.1, 1), Entry("b", math.nan, 2)))
    assert before.after(Change(Entry("c", 0.5, 2)), Retention(KeepBest(-1))).paths() == {"a", "c"}


def test_the_kth_is_the_one_that_a_better_one_pushes_out() -> None:
    catalog = Catalog(tuple(_entries([0.3, 0.1, 0.2])))
    kth = catalog.kth(Retention(KeepBest(2) | KeepNewest(2)))
    assert kth is not None and kth.score == 0.2
    assert catalog.kth(Retention(KeepBest(4))) is None
    assert catalog.kth(Retention(KeepNewest(1))) is None


HOUR, DAY = 3600.0, 86400.0
LADDER = KeepLadder((timedelta(hours=1), timedelta(days=1)), (timedelta(days=1), timedelta(days=30)))
RULES: list[Rule] = [KeepBest(2), KeepNewest(3), KeepEvery(10), LADDER]
HISTORY = st.lists(
    st.tuples(st.floats(0, 1), st.integers(1, 9), st.floats(1, 2 * DAY)), min_size=1, max_size=60
)  # score, steps and seconds since the one before


def _history(moves: list[tuple[float, int, float]]) -> list[Entry]:
    step, time, made = 0, 1.7e9, []
    for score, steps, seconds in moves:
        step, time = step + steps, time + seconds
        made.append(Entry(f"{step}.ckpt", score, step, time))
    return made


@given(HISTORY, st.lists(st.sampled_from(RULES), min_size=1, max_size=4))
def test_a_union_keeps_what_any_of_its_rules_keeps(moves: list[tuple[float, int, float]], rules: list[Rule]) -> None:
    entries, union = _history(moves), AnyOf(())
    for rule in rules:
        union = union | rule  # type: ignore[assignment]
    each = {entry.path for rule in rules for entry in Retention(rule).retain(entries)}
    assert {entry.path for entry in Retention(union).retain(entries)} == each


@given(HISTORY, st.sampled_from(RULES))
def test_pruning_at_each_save_leaves_what_pruning_once_would(moves: list[tuple[float, int, float]], rule: Rule) -> None:
    policy, entries = Retention(rule), _history(moves)
    kept: tuple[Entry, ...] = ()
    for entry in entries:
        kept = policy.retain((*kept, entry))
    assert kept == policy.retain(entries)


def test_every_so_many_steps_are_kept_for_good_though_no_save_falls_on_them() -> None:
    entries = [Entry(str(step), None, step) for step in (3, 9, 12, 15, 19, 21, 33)]
    assert [e.step for e in Retention(KeepEvery(10)).retain(entries)] == [12, 21, 33]


def test_a_ladder_is_fine_for_the_young_and_coarse_for_the_old() -> None:
    start = 1000 * DAY
    entries = [Entry(str(n), None, n, start + n * HOUR / 2) for n in range(48 * 40)]
    kept = Retention(LADDER).retain(entries)
    newest = entries[-1].time
    ages = [(newest - e.time) / DAY for e in kept]
    assert sum(age <= 1 for age in ages) == 24
    assert 28 <= sum(age > 1 for age in ages) <= 30 and max(ages) <= 30


def test_rules_that_cannot_be_meant_are_refused() -> None:
    for make in (
        lambda: KeepBest(-2),
        lambda: KeepNewest(0),
        lambda: KeepEvery(0),
        lambda: KeepLadder((timedelta(hours=2), timedelta(hours=1))),
    ):
        with pytest.raises(MisconfigurationException):
            make()
