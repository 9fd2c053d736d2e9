"""Parts of tensors: what a rank holds of one, and where the bytes of a part lie, as stored and in memory.

Pure: no I/O, no torch. Spans, offsets and sizes count elements, a `Region` counts bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from milepost.format.boxes import Box
from milepost.format.layout import PIECE_BYTES

Span = tuple[int, int]
"""A half-open range of indices of one dimension."""
Sizes = tuple[int, ...]
Steps = tuple[tuple[int, int, int], ...]
"""How something is repeated: (how often, bytes apart as stored, bytes apart in memory), the outermost first."""


# ---- shards of a dimension -------------------------------------------------------------------------------------------


def chunk(spans: Sequence[Span], count: int, number: int) -> list[Span]:
    """The part `number` of `count` of what `spans` hold, one after the other: equal parts rounded up, as torch.chunk's.

    Later parts may be shorter, or empty.
    """
    each = -(-sum(stop - start for start, stop in spans) // count)
    return _cut(spans, number * each, (number + 1) * each)


def strided_chunk(spans: Sequence[Span], factor: int, count: int, number: int) -> list[Span]:
    """The part `number` of `count` of each of `factor` chunks, one after the other.

    This is what a rank holds of a dimension that is sharded for tensor parallelism first and then by FSDP, where the
    mesh lists the two the other way round.
    """
    parts = [piece for n in range(factor) for piece in chunk(chunk(spans, factor, n), count, number)]
    joined: list[Span] = []
    for start, stop in parts:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _cut(spans: Sequence[Span], low: int, high: int) -> list[Span]:
    """What positions `low` to `high` of the spans, one after the other, are."""
    found, position = [], 0
    for start, stop in spans:
        first, last = max(low, position), min(high, position + stop - start)
        if first < last:
            found.append((start + first - position, start + last - position))
        position += stop - start
    return found


def grid(spans: Sequence[Sequence[Span]]) -> Iterator[tuple[Sizes, Sizes, Sizes]]:
    """The boxes that spans in each dimension make: offsets, sizes, and offsets in the tensor of just these spans."""
    if not spans:
        yield (), (), ()
        return
    for offsets, sizes, inner in grid(spans[:-1]):
        position = 0
        for start, stop in spans[-1]:
            yield (*offsets, start), (*sizes, stop - start), (*inner, position)
            position += stop - start


def common(one: Box, other: Box) -> Box | None:
    """What two boxes of one tensor both hold; None where that is nothing."""
    lows = tuple(map(max, one.offsets, other.offsets))
    stops = [min(a + n, b + m) for a, n, b, m in zip(*one, *other, strict=True)]
    sizes = tuple(stop - low for low, stop in zip(lows, stops, strict=True))
    return Box(lows, sizes) if all(n > 0 for n in sizes) else None


# ---- bytes -----------------------------------------------------------------------------------------------------------


class Region(NamedTuple):
    """The bytes of a box, in what is stored in C order and in memory with strides of its own.

    Attributes:
        start, stop: where its first byte lies in the stored bytes, and where its last one has been.
        run: how many bytes lie together on both sides.
        steps: how runs are repeated.
    """

    start: int
    stop: int
    run: int
    steps: Steps = ()


def region(shape: Sizes, offsets: Sizes, sizes: Sizes, item_bytes: int, strides: Sizes) -> Region:
    """How the bytes of a part of a stored tensor of `shape` lie in memory with `strides` (in bytes).

    Dimensions that lie alike on both sides are merged, so that a box of whole rows is a single run.
    """
    if math.prod(sizes) == 0:
        return Region(0, 0, 0)
    start, stored = 0, item_bytes
    reversed_steps: list[tuple[int, int, int]] = []
    run = item_bytes
    for size, offset, count, stride in zip(
        reversed(shape), reversed(offsets), reversed(sizes), reversed(strides), strict=True
    ):
        start += offset * stored
        if count > 1:
            last = reversed_steps[-1] if reversed_steps else (1, run, run)
            if (stored, stride) == (last[0] * last[1], last[0] * last[2]):
                merged = (last[0] * count, last[1], last[2])
                reversed_steps[-1:] = [merged]
            else:
                reversed_steps.append((count, stored, stride))
        stored *= size
    if reversed_steps and reversed_steps[0][1:] == (run, run):
        run *= reversed_steps.pop(0)[0]
    stop = start + run + sum((count - 1) * apart for count, apart, _ in reversed_steps)
    return Region(start, stop, run, tuple(reversed(reversed_steps)))


def touched(start: int, run: int, steps: Steps, gap: int = PIECE_BYTES) -> Iterator[Span]:
    """Ranges of stored bytes that hold a region which begins at `start`.

    Runs less than `gap` bytes apart are given as one range: in between there is no piece that could be left out.
    """
    extent = run + sum((count - 1) * apart for count, apart, _ in steps)
    if _widest_gap(steps, run) < gap:
        yield start, start + extent
    else:
        count, apart, _ = steps[0]
        for number in range(count):
            yield from touched(start + number * apart, run, steps[1:], gap)


def _widest_gap(steps: Steps, run: int) -> int:
    """The most bytes between two runs that follow each other."""
    widest, extent = 0, run
    for count, apart, _ in reversed(steps):
        widest = max(widest, apart - extent)
        extent += (count - 1) * apart
    return widest
