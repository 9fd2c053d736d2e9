"""What lies where, against NumPy and torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.format import regions
from milepost.format.regions import Region, Sizes

SIZES = st.lists(st.integers(1, 7), max_size=4).map(tuple)


@st.composite
def box_in(draw: Any, shape: Sizes) -> tuple[Sizes, Sizes]:
    lows = [draw(st.integers(0, n)) for n in shape]
    return tuple(lows), tuple(draw(st.integers(0, n - low)) for n, low in zip(shape, lows, strict=True))


def marked(shape: Sizes, offsets: Sizes, sizes: Sizes) -> np.ndarray:
    found = np.zeros(shape, bool)
    found[tuple(slice(low, low + n) for low, n in zip(offsets, sizes, strict=True))] = True
    return found


def copied(found: Region, source: bytes, target: bytearray, at: int = 0) -> None:
    """What a region means, byte for byte."""
    offsets = [(found.start, at)]
    for count, apart, beside in found.steps:
        offsets = [(s + n * apart, t + n * beside) for s, t in offsets for n in range(count)]
    for source_at, target_at in offsets:
        target[target_at : target_at + found.run] = source[source_at : source_at + found.run]


@settings(max_examples=300, deadline=None, database=None)
@given(st.data())
def test_a_region_copies_a_box_into_memory_of_any_strides(data: Any) -> None:
    shape = data.draw(SIZES)
    offsets, sizes = data.draw(box_in(shape))
    order = data.draw(st.permutations(range(len(shape))))
    spare = [data.draw(st.integers(0, 2)) for _ in shape]
    dtype = data.draw(st.sampled_from(["u1", "<u2", "<f4", "<c16"]))
    stored = np.arange(1, math.prod(shape) + 1).astype(dtype).reshape(shape)
    # memory: the dimensions in any order, with room left at the end of each
    held = np.zeros([sizes[d] + spare[d] for d in order], dtype)
    live = held[(*(slice(0, sizes[d]) for d in order), ...)].transpose(np.argsort(order).tolist())
    found = regions.region(shape, offsets, sizes, stored.itemsize, live.strides)
    target = bytearray(held.tobytes())
    copied(found, stored.tobytes(), target)
    held[...] = np.frombuffer(bytes(target), dtype).reshape(held.shape)
    assert np.array_equal(live, stored[tuple(slice(low, low + n) for low, n in zip(offsets, sizes, strict=True))])
    outside = np.ones(held.shape, bool)
    outside[tuple(slice(0, sizes[d]) for d in order)] = False
    assert not held[outside].any()

    # exactly the bytes of the box are touched, if nothing may be left out; with gaps allowed, no more than asked for
    wanted = np.repeat(marked(shape, offsets, sizes).reshape(-1), stored.itemsize)
    for gap in (1, 3, 1000):
        ranges = list(regions.touched(found.start, found.run, found.steps, gap)) if math.prod(sizes) else []
        covered = np.zeros(wanted.size, bool)
        for start, stop in ranges:
            assert not covered[start:stop].any()
            covered[start:stop] = True
        assert covered[wanted].all()
        if gap == 1:
            assert not covered[~wanted].any()


def test_whole_rows_are_one_run_and_columns_are_two_dimensional() -> None:
    shape = (8, 4, 6)
    assert regions.region(shape, (2, 0, 0), (3, 4, 6), 4, (96, 24, 4)) == Region(192, 480, 288)
    assert regions.region(shape, (0, 2, 0), (8, 2, 6), 4, (48, 24, 4)) == Region(48, 768, 48, ((8, 96, 48),))
    assert regions.region((), (), (), 8, ()) == Region(0, 8, 8)


@settings(deadline=None, database=None)
@given(st.integers(0, 40), st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), max_size=3), st.data())
def test_shards_are_those_that_torch_cuts(size: int, splits: list[tuple[int, int]], data: Any) -> None:
    values, spans = torch.arange(size), [(0, size)] if size else []
    for count, factor in splits:
        number = data.draw(st.integers(0, count - 1))
        if factor:
            parts = [part(piece, count, number) for piece in all_parts(values, factor)]
            values, spans = torch.cat(parts), regions.strided_chunk(spans, factor, count, number)
        else:
            values, spans = part(values, count, number), regions.chunk(spans, count, number)
    assert [n for start, stop in spans for n in range(start, stop)] == values.tolist()


def all_parts(values: torch.Tensor, count: int) -> list[torch.Tensor]:
    return [part(values, count, number) for number in range(count)]


def part(values: torch.Tensor, count: int, number: int) -> torch.Tensor:
    made = values.chunk(count) if len(values) else ()
    return made[number] if number < len(made) else values[:0]


def test_a_grid_gives_each_box_its_place_in_what_is_held() -> None:
    found = list(regions.grid([[(0, 2), (4, 5)], [(3, 6)]]))
    assert found == [((0, 3), (2, 3), (0, 0)), ((4, 3), (1, 3), (2, 0))]
    assert list(regions.grid([])) == [((), (), ())]
    assert list(regions.grid([[], [(0, 3)]])) == []
