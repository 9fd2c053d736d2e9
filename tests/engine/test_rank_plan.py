"""The plan of many ranks: each element written once, by a rank that holds it, and the bytes balanced."""

from __future__ import annotations

import math
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.engine.rank_plan import RankPlan, Spread, Tensor, described, difference, digest
from milepost.format.boxes import Box, fault


def tensor(name: str, shape: tuple[int, ...], spread: Spread | None = None) -> Tensor:
    return Tensor("model", name, "float32", 4, 4, shape, spread)


def mesh(shape: tuple[int, ...], *cuts: tuple[int, int]) -> Spread:
    return Spread(tuple(range(math.prod(shape))), shape, cuts)


SPREADS = {
    "everywhere": (4, None),
    "fsdp": (4, mesh((4,), (0, 0))),
    "hsdp": (4, mesh((2, 2), (0, 1))),
    "fsdp over tp, rows": (4, mesh((2, 2), (0, 1), (0, 0))),
    "fsdp over tp, columns": (4, mesh((2, 2), (1, 1), (0, 0))),
    "one of the mesh": (6, Spread((1, 3, 5), (3,), ((0, 0),))),
}


def check(plan: RankPlan) -> None:
    """Each element once, from a rank that holds it; loads, writers and rows as they are said to be."""
    shares = [plan.shares(rank) for rank in range(plan.world_size)]
    for number, planned in enumerate(plan.structure):
        whole = Box((0,) * len(planned.shape), planned.shape)
        found = [
            (rank, share.box or whole)
            for rank in range(len(shares))
            for share in shares[rank]
            if share.tensor == number
        ]
        assert fault(planned.shape, [box for _, box in found]) is None, (planned, found)
        for rank, box in found if whole.volume else ():
            held = plan.local_box(rank, number)
            assert held is not None
            for start, size, first, length in zip(box.offsets, box.shape, held.offsets, held.shape, strict=True):
                assert first <= start and start + size <= first + length
        assert sorted(plan.writers(number).tolist()) == sorted(rank for rank, _ in found)
        for rank, row in zip(plan.writers(number).tolist(), plan.rows[number].tolist(), strict=True):
            assert shares[rank][row].tensor == number  # all are of one type: rows are in the order of the structure
    loads = [
        sum(4 * math.prod((s.box or Box((), plan.structure[s.tensor].shape)).shape) for s in each) for each in shares
    ]
    assert plan.loads.tolist() == loads


@pytest.mark.parametrize("name", SPREADS)
def test_each_element_is_written_once_by_one_that_holds_it(name: str) -> None:
    world_size, spread = SPREADS[name]
    shapes = [(17, 3), (4, 4), (1, 9), (64, 64), (2, 5, 3), (3, 1000), (8, 8)]
    check(RankPlan([tensor(str(n), shape, spread) for n, shape in enumerate(shapes)], world_size))


@settings(max_examples=60, deadline=None, database=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(SPREADS)), st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=9
    )
)
def test_any_mixture(drawn: list[tuple[str, int, int]]) -> None:
    structure = [tensor(str(n), (a, b), SPREADS[kind][1]) for n, (kind, a, b) in enumerate(drawn)]
    check(RankPlan(structure, 6))


def test_scalars_and_tensors_without_elements_are_there_once() -> None:
    cut = mesh((4,), (0, 0))
    structure = [tensor("a", ()), tensor("b", (0, 3)), tensor("c", (0, 3), cut), tensor("d", (8, 0), cut)]
    plan = RankPlan(structure, 4)
    check(plan)
    assert all(share.box is None for rank in range(4) for share in plan.shares(rank))


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("kind", ["everywhere", "hsdp"])
@pytest.mark.parametrize("sizes", ["one large", "equal", "mixed", "a long row"])
def test_bytes_are_balanced(ranks: int, kind: str, sizes: str) -> None:
    draw = random.Random(ranks)
    shapes = {
        "one large": [(4096, 512)],
        "equal": [(700, 700)] * 5,
        "mixed": [(draw.randrange(1, 2000), draw.randrange(1, 600)) for _ in range(50)] + [(3000, 3000)],
        "a long row": [(1, 2_000_003), (2, 1_000_000), (1, 7)],
    }[sizes]
    if kind == "hsdp" and (ranks % 2 or sizes == "a long row"):
        pytest.skip("nothing to choose")
    spread = None if kind == "everywhere" else mesh((ranks // 2, 2), (0, 1))
    plan = RankPlan([tensor(str(n), shape, spread) for n, shape in enumerate(shapes)], ranks)
    check(plan)
    assert plan.loads.max() <= 1.05 * plan.loads.mean(), plan.loads


def test_whole_tensors_stay_whole_where_that_is_balanced() -> None:
    plan = RankPlan([tensor(str(n), (1000, 100)) for n in range(8)], 4)
    assert all(share.box is None for rank in range(4) for share in plan.shares(rank))
    assert plan.loads.max() == plan.loads.min()


def test_what_has_no_choice_is_counted_before_what_has() -> None:
    """Rank 0 alone holds the rows of the short ones: it gets less of what is everywhere."""
    short = [tensor(f"s{n}", (1, 50_000), mesh((4,), (0, 0))) for n in range(4)]
    plan = RankPlan([*short, *(tensor(f"w{n}", (100, 1000)) for n in range(20))], 4)
    assert plan.loads.max() <= 1.05 * plan.loads.mean()


def test_the_digest_tells_structures_apart_and_the_difference_names_them() -> None:
    one = [tensor("a", (4, 4)), tensor("b", (2,), mesh((4,), (0, 0)))]
    assert digest(one) == digest([tensor("a", (4, 4)), tensor("b", (2,), mesh((4,), (0, 0)))])
    for other in ([*one, tensor("c", ())], one[::-1], [one[0], tensor("b", (2,), None)], [tensor("a", (4, 5)), one[1]]):
        assert digest(one) != digest(other)
        assert difference(described(one), described(other))
    for values, said in (
        ([], "it lacks the PerRank value 'x'"),
        (["y", "x"], "in the order of"),
        (["x"], "lacks .*'y'"),
    ):
        own = ["x", "y"] if values else ["x"]
        assert digest(one, values) != digest(one, own)
        assert re.search(said, difference(described(one, own), described(one, values)))
    assert difference(described(one), described([tensor("a", (4, 5)), tensor("c", ())])) == (
        "it lacks 'b'; it alone has 'c'; it has otherwise 'a'"
    )


def test_a_thousand_ranks_take_arrays_not_loops() -> None:
    """Two million boxes: kept as arrays that tensors of one shape share, not as two million objects."""
    structure = [tensor(str(n), (4096, 64 + n % 5), mesh((2, 512), (0, 1))) for n in range(2000)]
    plan = RankPlan(structure, 1024)
    assert plan.loads.max() <= 1.05 * plan.loads.mean()
    assert plan.size_bytes < 10 << 20
    assert sum(len(plan.shares(rank)) for rank in (0, 511, 1023)) > 0
    assert int(np.sum(plan.loads)) == sum(4 * math.prod(t.shape) for t in structure)
