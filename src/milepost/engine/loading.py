"""Reading stored tensors into tensors: each rank the boxes that it holds, straight into their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from milepost import _distributed
from milepost.engine.locating import Located, Ref
from milepost.engine.reader import StoredCheckpoint
from milepost.engine.requests import Destination
from milepost.engine.shards import Held, box_of, held
from milepost.engine.state import own_values
from milepost.engine.writer import Workers
from milepost.format.boxes import Box
from milepost.format.codec import TensorRef
from milepost.format.regions import common, region

Empty = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]

BOUNCE_BYTES = 64 << 20
"""Read for memory that bytes cannot be put into, such as a GPU's, before it is copied there. Two such may be held."""


class Loading:
    """Collects what is to be read, and then reads it: of each blob each piece once, whoever wants a part of it."""

    def __init__(self, stored: StoredCheckpoint, located: Located, empty: Empty) -> None:
        self._stored = stored
        self._empty = empty
        self._located = located
        self._wanted: dict[int, list[Destination]] = {}
        self._after: list[tuple[torch.Tensor, torch.Tensor]] = []  # (the live memory, what is read for it)
        self._devices: set[torch.device] = set()
        self.bounced_bytes = 0
        """What the next `run` reads into memory that is given back."""

    def new(self, ref: Ref) -> torch.Tensor:
        """A whole tensor in new host memory."""
        dtype, shape = self._located.type_of(ref)
        made = self._empty(shape, dtype)
        if isinstance(ref, TensorRef):
            index = self._stored.index(ref.blob)
            if (strides := index.strides.get(str(ref.row))) is not None:
                final = _strided_like(self._empty(shape, dtype), tuple(strides))
                self._after.append((final, made))
                self._row(ref, made)
                return final
            self._row(ref, made)
        else:
            self._box(ref, Held(Box((0,) * len(shape), shape), made))
        return made

    def into(self, ref: Ref, tensor: torch.Tensor) -> None:
        """A tensor of the stored type and shape, of which the part that this rank holds is read.

        It is written directly where it is plain host memory, else by a copy, out of pinned memory for a GPU.
        """
        if isinstance(ref, TensorRef) and _direct(tensor) and tensor.is_contiguous():
            self._row(ref, tensor)
            return
        for part in held(tensor):
            if part.memory.numel() == 0:
                continue
            memory = part.memory
            if not _direct(memory):
                memory = torch.empty(memory.shape, dtype=memory.dtype, pin_memory=memory.is_cuda)
                self._after.append((part.memory, memory))
                self.bounced_bytes += memory.nbytes
            self._box(ref, Held(part.box, memory))

    def run(self, workers: Workers) -> None:
        """Read all that was collected.

        Raises:
            CheckpointCorruptError: a piece that is needed is damaged. Some tensors may have been written already.
        """
        self._stored.read(self._wanted, workers)
        with torch.no_grad():
            for live, read in self._after:
                live.copy_(read, non_blocking=live.is_cuda)  # torch keeps pinned memory until the copy is done
        self._devices |= {live.device for live, _ in self._after if live.is_cuda}
        self._wanted, self._after, self.bounced_bytes = {}, [], 0

    def finish(self, workers: Workers) -> None:
        """Read the rest, and wait until GPUs have taken all."""
        self.run(workers)
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()

    def _row(self, ref: TensorRef, memory: torch.Tensor) -> None:
        entry = self._stored.index(ref.blob).entry(ref.row)
        self._add(ref.blob, Destination(entry.start, entry.stop, memory.data_ptr(), entry.size))

    def _box(self, ref: Ref, part: Held) -> None:
        if isinstance(ref, TensorRef):
            _, shape = self._located.type_of(ref)
            self._meeting(ref, Box((0,) * len(shape), shape), part)
            return
        for place, box in self._located.parts(ref, [part.box]):
            self._meeting(place, box, part)

    def _meeting(self, place: TensorRef, stored: Box, part: Held) -> None:
        """What a stored box and a held one have in common."""
        both = common(stored, part.box)
        if both is None:
            return
        inner = [a - b for a, b in zip(both.offsets, part.box.offsets, strict=True)]
        memory = box_of(part.memory, inner, both.shape)
        item = memory.itemsize
        offsets = tuple(a - b for a, b in zip(both.offsets, stored.offsets, strict=True))
        found = region(stored.shape, offsets, both.shape, item, tuple(item * n for n in memory.stride()))
        start = self._stored.index(place.blob).entry(place.row).start
        self._add(
            place.blob,
            Destination(start + found.start, start + found.stop, memory.data_ptr(), found.run, found.steps),
        )

    def _add(self, blob: int, destination: Destination) -> None:
        self._wanted.setdefault(blob, []).append(destination)


def read_tensors(
    stored: StoredCheckpoint,
    located: Located,
    workers: Workers,
    wanted: Iterable[Ref],
    into: Mapping[Ref, Sequence[torch.Tensor]],
    empty: Empty | None = None,
) -> dict[Ref, torch.Tensor]:
    """Read tensors, each into those given for it, or into new memory.

    Args:
        into: tensors of the stored type and shape, on any device, DTensors too.
        empty: makes the others, in C order; None: in new memory.

    Returns:
        For each the first tensor given, or the new one.
    """
    loading = Loading(stored, located, empty or _new)
    found: dict[Ref, torch.Tensor] = {}
    for ref in wanted:
        given = into.get(ref)
        if not given:
            found[ref] = loading.new(ref)
            continue
        found[ref] = given[0]
        for tensor in given:
            loading.into(ref, tensor)
        if loading.bounced_bytes >= BOUNCE_BYTES:  # what a GPU takes now overlaps with what is read next
            loading.run(workers)
    loading.finish(workers)
    return found


def _new(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _strided_like(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The memory of a dense tensor in C order, walked over otherwise."""
    return tensor.as_strided(tensor.shape, strides)


def _direct(tensor: torch.Tensor) -> bool:
    """Whether bytes can be put into its memory: host memory of a plain tensor, each element at a place of its own."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.device.type != "cpu":
        return False
    if tensor.is_conj() or tensor.is_neg():
        return False
    if tensor.is_contiguous():
        return True
    extent = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride < extent:
            return False
        extent = stride * (size - 1) + extent
    return True


def owned_tree(stored: StoredCheckpoint) -> Any:
    """The tree with what is each rank's own: this rank's where as many ranks saved, else `OfAllRanks` of all."""
    trees = stored.head.rank_trees()
    if not trees:
        return stored.tree
    rank = _distributed.rank() if len(trees) == _distributed.world_size() else None
    return own_values(stored.tree, stored.rank_tree, rank, len(trees))
