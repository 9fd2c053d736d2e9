"""What is kept: pure policies over entries."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from milepost.engine.retention import Catalog, Change, Entry, Retention, obsolete

SCORES = st.lists(st.one_of(st.none(), st.floats(allow_nan=True)), max_size=12)


def _entries(scores: list[float | None]) -> list[Entry]:
    return [Entry(f"{i}.ckpt", score, i) for i, score in enumerate(scores)]


@given(SCORES, st.integers(0, 5), st.sampled_from(["min", "max"]))
def test_the_kept_are_at_least_as_good_as_the_dropped(scores: list[float | None], k: int, mode: str) -> None:
    policy = Retention(k, mode)  # type: ignore[arg-type]
    entries = _entries(scores)
    kept = policy.retain(entries)
    assert len(kept) == min(k, len(entries))
    sign = 1 if mode == "min" else -1
    comparable = [sign * e.score for e in kept if e.scored]  # type: ignore[operator]
    dropped = [sign * e.score for e in entries if e.scored and e not in kept]  # type: ignore[operator]
    assert all(a <= b for a in comparable for b in dropped)
    assert not dropped or len(comparable) == len(kept), "an entry without a score displaced one that has it"


def test_a_tie_keeps_the_earlier_and_is_not_admitted() -> None:
    policy = Retention(1, "min")
    assert not policy.admits(_entries([0.5]), 0.5)
    assert policy.admits(_entries([0.5]), 0.4)
    assert [e.path for e in policy.retain(_entries([0.5, 0.5]))] == ["0.ckpt"]


def test_nan_is_best_only_where_there_is_nothing_else() -> None:
    policy = Retention(1, "max")
    assert policy.admits([], math.nan)
    assert policy.admits(_entries([math.nan]), -math.inf)
    assert not policy.admits(_entries([0.0]), math.nan)
    assert policy.admits(_entries([math.nan]), math.nan), "the newest of those that cannot be compared"


def test_all_and_none() -> None:
    assert not Retention(0).admits([], 1.0)
    assert Retention(-1).admits(_entries([1.0] * 9), math.nan)
    assert len(Retention(-1).retain(_entries([1.0] * 9))) == 9


def test_without_scores_the_newest_is_the_best() -> None:
    catalog = Catalog(tuple(_entries([None, None, None])))
    best = catalog.best(Retention(-1))
    assert best is not None and best.path == "2.ckpt"


def test_a_change_replaces_the_last_and_drops_what_is_not_kept() -> None:
    policy = Retention(1, "min")
    before = Catalog((Entry("a", 1.0),), last="old-last", crash="crash")
    after = before.after(Change(Entry("b", 0.5), last="new-last"), policy)
    assert after.paths() == {"b", "new-last"}
    assert obsolete(before, after) == ["a", "crash", "old-last"]


def test_saving_over_an_entry_of_the_same_path_keeps_one() -> None:
    after = Catalog((Entry("a", 1.0),)).after(Change(Entry("a", 0.5)), Retention(2, "min"))
    assert after.entries == (Entry("a", 0.5),)


def test_the_best_of_an_earlier_directory_counts_but_takes_no_place() -> None:
    policy = Retention(1, "min")
    catalog = Catalog((Entry("here", 0.5),), elsewhere=Entry("there", 0.1))
    best = catalog.best(policy)
    assert best is not None and best.path == "there"
    assert catalog.after(Change(Entry("new", 0.3)), policy).entries == (Entry("new", 0.3),)
    assert "there" not in catalog.paths()
