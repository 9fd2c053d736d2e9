"""Finding where stored tensors lie: of which type they are, and which of their parts hold a box that is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch

from milepost.engine.reader import StoredCheckpoint
from milepost.engine.state import stored_type
from milepost.errors import CheckpointFormatError
from milepost.format.boxes import Box, fault
from milepost.format.codec import PartsRef, TensorRef
from milepost.format.regions import common

Ref = TensorRef | PartsRef
Part = tuple[TensorRef, Box]


class Located:
    """The tensors of a checkpoint, as one rank looks for them. Of the indexes only those are read that are needed.

    A rank that loads what it has saved finds all of it in its own blobs. Else it looks first where it would be if a
    tensor's parts were equally large and in order, and stops when what it wants is complete.
    """

    def __init__(self, stored: StoredCheckpoint, rank: int) -> None:
        self._stored = stored
        self._own_blobs = {n for n, blob in enumerate(stored.head.blobs) if blob.rank == rank}
        self._known: dict[PartsRef, dict[TensorRef, Box]] = {}
        self._kinds: dict[PartsRef, tuple[str, torch.dtype, tuple[int, ...]]] = {}

    def type_of(self, ref: Ref) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of the whole tensor.

        Raises:
            CheckpointFormatError: it is not there, or no tensor.
        """
        if isinstance(ref, TensorRef):
            return stored_type(self._stored.index(ref.blob), ref.row)
        if ref not in self._kinds:
            self._part(ref, next(self._ordered(ref, 0.0)))
        return self._kinds[ref][1:]

    def parts(self, ref: PartsRef, wanted: Sequence[Box]) -> list[Part]:
        """Parts of a tensor that together hold all of the boxes, each element once.

        Raises:
            CheckpointFormatError: some of it is in no part, or in two.
        """
        _, shape = self.type_of(ref)
        found: dict[TensorRef, Box] = {}
        for box in wanted:
            if box.volume:
                found.update(self._covering(ref, box, shape))
        return list(found.items())

    def _covering(self, ref: PartsRef, box: Box, shape: tuple[int, ...]) -> dict[TensorRef, Box]:
        first = next((low / size for low, size, n in zip(box.offsets, shape, box.shape, strict=True) if n < size), 0.0)
        found: dict[TensorRef, Box] = {}
        inside: list[Box] = []
        missing = box.volume
        for place in self._ordered(ref, first):
            part = self._part(ref, place)
            meeting = common(part, box)
            if meeting is not None:
                found[place] = part
                inside.append(meeting)
                missing -= meeting.volume
            if missing <= 0:
                break
        moved = [Box(tuple(a - b for a, b in zip(i.offsets, box.offsets, strict=True)), i.shape) for i in inside]
        if wrong := fault(box.shape, moved):
            name = self._kinds[ref][0]
            raise CheckpointFormatError(f"{self._stored.path}: the parts of {name!r} do not fill it: {wrong}.")
        return found

    def _ordered(self, ref: PartsRef, fraction: float) -> Iterator[TensorRef]:
        """The parts, in the order in which it is likely that they are of use: this rank's own, then from there on."""
        own = [n for n, blob in enumerate(ref.blobs) if blob in self._own_blobs]
        for number in own:
            yield TensorRef(ref.blobs[number], ref.rows[number])
        middle = min(int(fraction * len(ref.blobs)), len(ref.blobs) - 1)
        after, before = range(middle, len(ref.blobs)), range(middle - 1, -1, -1)
        for pair in zip_longest(after, before):
            for number in pair:
                if number is not None and number not in own:
                    yield TensorRef(ref.blobs[number], ref.rows[number])

    def _part(self, ref: PartsRef, place: TensorRef) -> Box:
        """Which box a part is; checked to belong to the same tensor as those that were seen before."""
        known = self._known.setdefault(ref, {})
        if place in known:
            return known[place]
        index = self._stored.index(place.blob)
        dtype, _ = stored_type(index, place.row)
        box = index.box(place.row)
        if box is None:
            raise CheckpointFormatError(
                f"{self._stored.path}: the tree takes {index.names[place.row]!r} for a part of a tensor."
            )
        name, shape, _ = index.boxes[str(place.row)]
        kind = (name, dtype, tuple(shape))
        if self._kinds.setdefault(ref, kind) != kind:
            raise CheckpointFormatError(
                f"{self._stored.path}: the tree takes parts of {self._kinds[ref]} and {kind} for one tensor."
            )
        known[place] = box
        return box
