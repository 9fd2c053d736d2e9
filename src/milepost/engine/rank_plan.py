"""Who of many ranks writes what: a pure function of the structure, computed by every rank alone.

No I/O, no torch. A tensor lies over the ranks in boxes, each held by one rank or by several, its replicas. Each box
goes to one of its replicas, the largest first, to the one with the least so far; a box that none of them has room for
is cut over several. With 1,024 ranks there are a million boxes: all of one tensor are dealt with at once, as arrays.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from milepost.format.boxes import Box

_SPARE = 1.02
"""Room over the mean within which a rank takes a box whole."""
_ROW_SHARE = 0.01
"""A tensor is cut between rows of at most this share of what a rank writes, in the first dimension that has such."""

Numbers = npt.NDArray[np.int64]


class Spread(NamedTuple):
    """How a tensor is cut and copied over ranks.

    Attributes:
        ranks: of the mesh, in C order.
        mesh: sizes of the mesh's dimensions.
        cuts: (dimension of the tensor, dimension of the mesh) in the order in which they were applied; over all other
            dimensions of the mesh it is replicated.
    """

    ranks: tuple[int, ...]
    mesh: tuple[int, ...]
    cuts: tuple[tuple[int, int], ...]


class Tensor(NamedTuple):
    """What the plan has to know of a tensor.

    Attributes:
        file: tensors of one file lie in one blob for each rank.
        name: in that file.
        dtype: torch's, as text.
        element_bytes: size of an element.
        row_bytes: size of an element as the file takes it: rows of wider ones come first.
        shape: of the whole.
        spread: None where each rank holds it whole.
    """

    file: str
    name: str
    dtype: str
    element_bytes: int
    row_bytes: int
    shape: tuple[int, ...]
    spread: Spread | None


def described(structure: Sequence[Tensor], values: Sequence[str] = ()) -> list[list[Any]]:
    """The structure as plain data, which ranks compare. Values that are each rank's own come last, as of no file."""
    spreads = {tensor.spread: repr(tensor.spread) for tensor in structure}  # there are few, and they can be long
    tensors = [[t.file, t.name, t.dtype, list(t.shape), spreads[t.spread]] for t in structure]
    return tensors + [[None, path] for path in values]


def digest(structure: Sequence[Tensor], values: Sequence[str] = ()) -> str:
    """Equal on all ranks that mean the same.

    Args:
        values: key paths of those that are each rank's own: the tree refers to them by their numbers in this order.
    """
    spreads: dict[Spread | None, int] = {}
    rows = [(*tensor[:6], spreads.setdefault(tensor.spread, len(spreads))) for tensor in structure]
    return hashlib.blake2b(repr((rows, list(spreads), list(values))).encode(), digest_size=16).hexdigest()


def difference(one: Sequence[Sequence[Any]], other: Sequence[Sequence[Any]]) -> str:
    """How the structure `other` differs from `one`, in a few words; both as `described` gives them."""
    first, second = ({(t[0], t[1]): list(t[2:]) for t in structure} for structure in (one, other))
    cases = {
        "it lacks": [key for key in first if key not in second],
        "it alone has": [key for key in second if key not in first],
        "it has otherwise": [key for key in first if key in second and first[key] != second[key]],
    }
    said = [
        f"{what} {', '.join(map(_called, keys[:3]))}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for what, keys in cases.items()
        if keys
    ]
    return "; ".join(said) or "in the order of its tensors or of its PerRank values"


def _called(key: tuple[str | None, str]) -> str:
    file, name = key
    return f"the PerRank value {name!r}" if file is None else repr(name)


class _Shape:
    """The boxes of tensors of one shape under one spread."""

    def __init__(self, mesh: _Mesh, shape: tuple[int, ...]) -> None:
        self.mesh = mesh
        self.shape = shape
        self.bounds = {dimension: _bounds(shape[dimension], parts) for dimension, parts in mesh.parts.items()}
        lengths = [stops - starts for starts, stops in self.bounds.values()]
        volumes = np.array([math.prod(n for d, n in enumerate(shape) if d not in self.bounds)], dtype=np.int64)
        for length in lengths:
            volumes = np.multiply.outer(volumes, length).reshape(-1)
        self.volumes: Numbers = volumes

    def box(self, number: int) -> Box:
        offsets, sizes = [0] * len(self.shape), list(self.shape)
        for dimension, (starts, stops) in reversed(self.bounds.items()):
            number, at = divmod(number, len(starts))
            offsets[dimension], sizes[dimension] = int(starts[at]), int(stops[at] - starts[at])
        return Box(tuple(offsets), tuple(sizes))


class _Mesh:
    """Which box each rank holds, whatever the shape."""

    def __init__(self, spread: Spread, world_size: int) -> None:
        self.parts: dict[int, list[int]] = {}
        over: dict[int, list[int]] = {}
        for dimension, axis in spread.cuts:
            self.parts.setdefault(dimension, []).append(spread.mesh[axis])
            over.setdefault(dimension, []).append(axis)
        coordinates = np.unravel_index(np.arange(len(spread.ranks)), spread.mesh) if spread.mesh else ()
        number = np.zeros(len(spread.ranks), dtype=np.int64)
        for axes in over.values():
            for axis in axes:
                number = number * spread.mesh[axis] + coordinates[axis]
        ranks = np.array(spread.ranks, dtype=np.int64)
        boxes = math.prod(spread.mesh[axis] for axes in over.values() for axis in axes)
        self.holders: Numbers = ranks[np.argsort(number, kind="stable")].reshape(boxes, -1)
        self.box_of: Numbers = np.full(world_size, -1, dtype=np.int64)
        self.box_of[ranks] = number
        self.all = np.arange(boxes)


def _bounds(size: int, parts: Sequence[int]) -> tuple[Numbers, Numbers]:
    """Where the parts of a dimension begin and end: cut again and again, each time as `torch.chunk` does."""
    starts, stops = np.array([0], dtype=np.int64), np.array([size], dtype=np.int64)
    for count in parts:
        each = -(-(stops - starts) // count)
        steps = np.arange(count)
        low = np.minimum(starts[:, None] + steps * each[:, None], stops[:, None])
        high = np.minimum(low + each[:, None], stops[:, None])
        starts, stops = low.reshape(-1), high.reshape(-1)
    return starts, stops


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a tensor that one rank writes.

    Attributes:
        tensor: its number in the structure.
        box: None for a whole tensor.
    """

    tensor: int
    box: Box | None


class RankPlan:
    """Which rank writes which box of which tensor.

    Args:
        structure: in the order of the state; the same on every rank.

    Attributes:
        loads: bytes that each rank writes.
    """

    def __init__(self, structure: Sequence[Tensor], world_size: int) -> None:
        self.structure = tuple(structure)
        self.world_size = world_size
        self._everywhere = Spread(tuple(range(world_size)), (world_size,), ())
        self._meshes: dict[Spread, _Mesh] = {}
        self._known: dict[tuple[Spread, tuple[int, ...]], _Shape] = {}
        self._shapes = [self._shape(tensor) for tensor in structure]
        self._owners: dict[int, Numbers] = {}  # by tensor, where a box has replicas: who writes each
        self._cuts: dict[int, dict[int, list[tuple[int, Box]]]] = {}  # by tensor and box, where it is cut over several
        self.loads: Numbers = np.zeros(world_size, dtype=np.int64)
        self._assign()

    @property
    def size_bytes(self) -> int:
        """Memory of the plan, apart from the structure itself."""
        boxes = sum(64 * len(cut) for cuts in self._cuts.values() for cut in cuts.values())
        shapes = sum(
            shape.volumes.nbytes + sum(a.nbytes + b.nbytes for a, b in shape.bounds.values())
            for shape in self._known.values()
        )
        meshes = sum(mesh.holders.nbytes + mesh.box_of.nbytes + mesh.all.nbytes for mesh in self._meshes.values())
        return boxes + shapes + meshes + sum(owners.nbytes for owners in self._owners.values()) + self.loads.nbytes

    def _shape(self, tensor: Tensor) -> _Shape:
        spread = tensor.spread or self._everywhere
        key = (spread, tensor.shape)
        if key not in self._known:
            if spread not in self._meshes:
                self._meshes[spread] = _Mesh(spread, self.world_size)
            self._known[key] = _Shape(self._meshes[spread], tensor.shape)
        return self._known[key]

    # ---- who writes what -------------------------------------------------------------------------------------------

    def _assign(self) -> None:
        open_: list[tuple[int, int]] = []
        total = 0
        for number, (tensor, shape) in enumerate(zip(self.structure, self._shapes, strict=True)):
            bytes_ = shape.volumes * tensor.element_bytes
            total += int(bytes_.sum())
            if shape.mesh.holders.shape[1] == 1:
                self.loads[shape.mesh.holders[:, 0]] += bytes_
            else:
                open_.append((-int(bytes_.max()), number))
        mean = max(total / self.world_size, float(self.loads.max()))
        for _, number in sorted(open_):
            self._choose(number, mean * _SPARE, mean * _ROW_SHARE)

    def _choose(self, number: int, limit: float, row_bytes: float) -> None:
        """Give each box of a tensor to one of its replicas, or to several."""
        shape = self._shapes[number]
        bytes_ = shape.volumes * self.structure[number].element_bytes
        held = self.loads[shape.mesh.holders]
        chosen = held.argmin(axis=1)
        owners = shape.mesh.holders[shape.mesh.all, chosen]
        fits = (held[shape.mesh.all, chosen] + bytes_ <= limit) | (bytes_ <= row_bytes) | (shape.volumes < 2)
        self.loads[owners[fits]] += bytes_[fits]
        self._owners[number] = owners
        if not fits.all():
            cuts = self._cuts[number] = {}
            for box in np.flatnonzero(~fits).tolist():
                cuts[box] = self._cut(shape.box(box), number, shape.mesh.holders[box], limit, row_bytes)

    def _cut(self, box: Box, number: int, holders: Numbers, limit: float, row_bytes: float) -> list[tuple[int, Box]]:
        element = self.structure[number].element_bytes
        size = box.volume * element
        order = np.argsort(self.loads[holders], kind="stable")
        ranks = holders[order].tolist()
        shares = _shares(self.loads[holders[order]].astype(float), size, limit, row_bytes)
        dimension = _dimension_to_cut(box, element, row_bytes)
        ends = np.rint(np.cumsum(shares) / size * box.shape[dimension]).astype(int).tolist()
        found: list[tuple[int, Box]] = []
        start = 0
        for rank, stop in zip(ranks, ends, strict=False):
            if stop > start:
                part = _slice(box, dimension, start, stop)
                self.loads[rank] += part.volume * element
                found.append((rank, part))
                start = stop
        return found

    # ---- what follows from it --------------------------------------------------------------------------------------

    def shares(self, rank: int) -> list[Share]:
        """What `rank` writes, in the order of the structure."""
        found: list[Share] = []
        for number, shape in enumerate(self._shapes):
            box = int(shape.mesh.box_of[rank])
            if box < 0:
                continue
            cut = self._cuts.get(number, {}).get(box)
            if cut is not None:
                found.extend(Share(number, part) for owner, part in cut if owner == rank)
            elif self._writer(number, shape, box) == rank and self._is_there(shape, box):
                found.append(Share(number, shape.box(box) if len(shape.volumes) > 1 else None))
        return [self._as_whole(share) for share in found]

    def local_box(self, rank: int, tensor: int) -> Box | None:
        """Which part of a tensor `rank` holds in its memory; None where it holds nothing of it."""
        shape = self._shapes[tensor]
        box = int(shape.mesh.box_of[rank])
        return None if box < 0 else shape.box(box)

    def writers(self, tensor: int) -> Numbers:
        """The ranks that write parts of a tensor, in the order of the parts."""
        shape = self._shapes[tensor]
        owners = self._owners.get(tensor)
        owners = shape.mesh.holders[:, 0] if owners is None else owners
        cuts = self._cuts.get(tensor)
        if not cuts:
            there = shape.volumes > 0
            return owners[there] if there.any() else owners[:1]
        found: list[int] = []
        for box, owner in enumerate(owners.tolist()):
            if box in cuts:
                found.extend(rank for rank, _ in cuts[box])
            elif shape.volumes[box]:
                found.append(owner)
        return np.array(found, dtype=np.int64)

    @cached_property
    def rows(self) -> list[Numbers]:
        """By tensor, the row of each part in its writer's blob of that file, in the order of `writers`."""
        counters: dict[str, Numbers] = {}
        rows: list[Numbers] = [np.zeros(0, dtype=np.int64)] * len(self.structure)
        for number in sorted(range(len(self.structure)), key=lambda n: -self.structure[n].row_bytes):
            counter = counters.setdefault(self.structure[number].file, np.zeros(self.world_size, dtype=np.int64))
            writers = self.writers(number)
            rows[number] = counter[writers]
            counter[writers] += 1
        return rows

    def _writer(self, number: int, shape: _Shape, box: int) -> int:
        owners = self._owners.get(number)
        return int(shape.mesh.holders[box, 0] if owners is None else owners[box])

    def _is_there(self, shape: _Shape, box: int) -> bool:
        """Whether a box is stored: one without elements only where the tensor has none, and then once."""
        return bool(shape.volumes[box]) or (box == 0 and not shape.volumes.any())

    def _as_whole(self, share: Share) -> Share:
        """A box that is all of its tensor is no part; nor is what stands for a tensor without elements."""
        shape = self.structure[share.tensor].shape
        return Share(share.tensor, None) if share.box and (share.box.shape == shape or 0 in shape) else share


def _shares(loads: npt.NDArray[np.float64], size: int, limit: float, least: float) -> npt.NDArray[np.float64]:
    """How many of `size` bytes each of several ranks takes, given what they have, the least first.

    Few take part, each up to the limit; where all of them have no room for it, all end at one level.
    """
    room = limit - loads
    room = room[room >= least]
    filled = np.cumsum(room)
    if len(filled) and filled[-1] >= size:
        count = int(np.searchsorted(filled, size)) + 1
        return np.append(room[: count - 1], size - (filled[count - 2] if count > 1 else 0.0))
    levels = (size + np.cumsum(loads)) / np.arange(1, len(loads) + 1)
    count = int(np.flatnonzero(levels >= loads)[-1]) + 1
    return np.asarray(levels[count - 1] - loads[:count])


def _dimension_to_cut(box: Box, element_bytes: int, row_bytes: float) -> int:
    """The first dimension that can be cut finely enough, or the longest."""
    size = box.volume * element_bytes
    fine = (d for d, n in enumerate(box.shape) if n > 1 and size / n <= row_bytes)
    return next(fine, max(range(len(box.shape)), key=lambda d: box.shape[d], default=0))


def _slice(box: Box, dimension: int, start: int, stop: int) -> Box:
    offsets, shape = list(box.offsets), list(box.shape)
    offsets[dimension] += start
    shape[dimension] = stop - start
    return Box(tuple(offsets), tuple(shape))
