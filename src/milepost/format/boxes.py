"""Boxes: the parts that a large tensor is cut into, one for each rank that holds a part of it.

Pure: no I/O, no torch. Offsets and sizes count elements, one for each dimension of the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

_MAX_KNOT = 512
"""Boxes that no straight cut through all of them separates: compared pair by pair, up to this many."""
_MAX_CUTS = 64
"""How often parts are cut again; a mesh of as many dimensions needs as many. Time stays linear whatever a file says."""


class Box(NamedTuple):
    """A part of a tensor.

    Attributes:
        offsets: where it begins in the whole tensor.
        shape: its own sizes.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def part_name(name: str, box: Box) -> str:
    """The name of a part in its file: nobody takes it for the whole."""
    ranges = (f"{first}:{first + size}" for first, size in zip(box.offsets, box.shape, strict=True))
    return f"{name}[{','.join(ranges)}]"


def lies_within(box: Box, shape: Sequence[int]) -> bool:
    """Whether it is a part of a tensor of this shape: as many dimensions, each inside."""
    return len(box.offsets) == len(box.shape) == len(shape) and all(
        min(first, size) >= 0 and first + size <= whole
        for first, size, whole in zip(box.offsets, box.shape, shape, strict=True)
    )


def fault(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Why `boxes`, each within `shape`, do not fill it, or None where they do: nothing missing, nothing twice.

    Boxes of one volume in all that do not overlap leave no gap. Time is about linear in the boxes where straight cuts
    separate them, as those of any mesh do.
    """
    if not boxes:
        return "there are none"
    filled, whole = sum(box.volume for box in boxes), math.prod(shape)
    if whole == 0:
        return None if len(boxes) == 1 else f"{len(boxes)} of a tensor without elements"
    if any(box.volume == 0 for box in boxes):
        return "one has no elements"
    if filled < whole:
        return f"they leave {whole - filled} of {whole} elements out"
    waiting = [(list(boxes), 0)]
    while waiting:
        group, depth = waiting.pop()
        parts = _separated(group)
        if len(parts) > 1 and depth < _MAX_CUTS:
            waiting.extend((part, depth + 1) for part in parts if len(part) > 1)
        elif len(group) > _MAX_KNOT:
            return f"{len(group)} are entangled"
        elif any(_overlap(a, b) for n, a in enumerate(group) for b in group[:n]):
            return "two overlap"
    return None if filled == whole else "two overlap"


def _separated(group: list[Box]) -> list[list[Box]]:
    """The boxes between straight cuts along one dimension; all in one list where no cut is possible."""
    for dimension in range(len(group[0].offsets) if len(group) > 1 else 0):
        ordered = sorted(group, key=lambda box: box.offsets[dimension])
        parts, end = [[ordered[0]]], ordered[0].offsets[dimension] + ordered[0].shape[dimension]
        for box in ordered[1:]:
            if box.offsets[dimension] >= end:
                parts.append([])
            parts[-1].append(box)
            end = max(end, box.offsets[dimension] + box.shape[dimension])
        if len(parts) > 1:
            return parts
    return [group]


def _overlap(one: Box, other: Box) -> bool:
    return all(
        a < b + m and b < a + n for a, n, b, m in zip(one.offsets, one.shape, other.offsets, other.shape, strict=True)
    )
