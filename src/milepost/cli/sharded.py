"""A checkpoint directory as the commands see it, whether one rank saved it or many. Read without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from milepost.engine.reader import StoredCheckpoint
from milepost.errors import CheckpointFormatError
from milepost.format.boxes import Box
from milepost.format.codec import PartsRef, RanksRef, TensorRef
from milepost.format.parts import parted

Reader = Callable[[], bytes]


class Row:
    """What is stored in one row: a whole tensor, or a box of one.

    Attributes:
        dtype: as safetensors names it, or torch's own name where it has none.
        file: the blob's path.
        start, stop: its bytes there.
    """

    def __init__(self, stored: StoredCheckpoint, path: Path, ref: TensorRef) -> None:
        index = stored.index(ref.blob)
        if ref.row >= len(index.names):
            raise CheckpointFormatError(f"{path}: the tree refers to {ref}, which is not there.")
        entry, other = index.entry(ref.row), index.stored_as.get(str(ref.row))
        self.dtype = entry.dtype if other is None else other[0].removeprefix("torch.")
        self.shape = index.shape(ref.row)
        self.file = path / stored.head.blobs[ref.blob].name
        self.start, self.stop = entry.start, entry.stop


Found = tuple[str, tuple[int, ...], list[tuple[Row, Box | None]]]


def located(stored: StoredCheckpoint, path: Path, ref: TensorRef | PartsRef) -> Found:
    """Type, shape and rows of a tensor. Parts are checked to fill it.

    Raises:
        CheckpointFormatError: it is not there, or not all of it.
    """
    if isinstance(ref, TensorRef):
        row = Row(stored, path, ref)
        return row.dtype, row.shape, [(row, None)]
    whole = parted(ref, stored.index, str(path))
    rows: list[tuple[Row, Box | None]] = [(Row(stored, path, place), box) for place, box in whole.parts]
    return rows[0][0].dtype, whole.shape, rows


def reader(found: Found, read: Callable[[Path, int, int], Reader]) -> Reader:
    """The bytes of a tensor in C order, put together from its parts."""
    _, shape, rows = found
    if len(rows) == 1 and rows[0][1] is None:
        row = rows[0][0]
        return read(row.file, row.start, row.stop)

    def assembled() -> bytes:
        import numpy

        size = sum(row.stop - row.start for row, _ in rows)
        made = numpy.empty(shape, f"V{size // max(math.prod(shape), 1) or 1}")
        for row, box in rows:
            data = read(row.file, row.start, row.stop)()
            if box is not None and data:
                place = tuple(slice(at, at + n) for at, n in zip(*box, strict=True))
                made[place] = numpy.frombuffer(data, made.dtype).reshape(box.shape)
        return made.tobytes()

    return assembled


def own_values(stored: StoredCheckpoint, leaves: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The leaves, each that is every rank's own with what each rank has there: ``name (rank 3)``."""
    trees = [stored.rank_tree(rank) for rank in range(len(stored.head.rank_trees()))]
    for name, value in leaves:
        if not isinstance(value, RanksRef):
            yield name, value
            continue
        for rank, tree in enumerate(trees):
            if value.number >= len(tree):
                raise CheckpointFormatError(f"{stored.path}: rank {rank} has no value of its own for {name!r}.")
            yield f"{name} (rank {rank})", tree[value.number]
