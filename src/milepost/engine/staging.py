"""Getting a state's bytes into memory that later steps cannot change, and into the order of the file."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

import torch

from milepost.engine.batch import Batch, Staging
from milepost.engine.device import Cuda, Device
from milepost.engine.memory import Memory
from milepost.engine.requests import BlobPlan, Image
from milepost.format.layout import TensorEntry


class Source:
    """Where the bytes of a blob come from: its header, then the leaves in the order of the layout."""

    def __init__(self, plan: BlobPlan) -> None:
        self.plan = plan
        self.size = plan.layout.size
        self._entries = plan.layout.entries
        self._starts = [entry.start for entry in self._entries]

    def copy(self, start: int, stop: int, address: int) -> None:
        """Copy the bytes of a range of the file to `address`."""
        header = self.plan.layout.header
        if start < len(header):
            part = header[start:stop]
            ctypes.memmove(address, part, len(part))
        number = max(bisect_right(self._starts, start) - 1, 0)
        while number < len(self._entries) and self._entries[number].start < stop:
            entry = self._entries[number]
            first, last = max(start, entry.start), min(stop, entry.stop)
            if first < last:
                tensor = self.plan.tensors[number]
                copy_bytes(tensor, entry, first, last, address + first - start)
            number += 1


def copy_bytes(tensor: torch.Tensor, entry: TensorEntry, first: int, last: int, address: int) -> None:
    """Copy the bytes of `tensor` that lie at `first` to `last` of the file to `address`, in C order."""
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        ctypes.memmove(address, tensor.data_ptr() + first - entry.start, last - first)
        return
    rows = tensor if tensor.ndim else tensor.reshape(1)
    each = entry.size // rows.shape[0]  # only the rows in the range are brought into order, and only they to the host
    low, high = (first - entry.start) // each, -(-(last - entry.start) // each)
    part = rows[low:high].cpu().contiguous()
    ctypes.memmove(address, part.data_ptr() + first - entry.start - low * each, last - first)


class LiveImage:
    """The bytes of a blob still in the tensors themselves: copied when a chunk is asked for. Nobody may change them."""

    def __init__(self, source: Source) -> None:
        self.size = source.size
        self._source = source

    def view(self, start: int, stop: int, buffer: memoryview) -> memoryview:
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        self._source.copy(start, min(stop, self.size), address)
        return buffer[: stop - start]


class StagedImage:
    """The bytes of a blob in an arena, as they were when they were staged."""

    def __init__(self, plan: BlobPlan, memory: memoryview, address: int) -> None:
        self.size = plan.layout.size
        self.address = address
        self._memory = memory

    def view(self, start: int, stop: int, buffer: memoryview) -> memoryview:
        return self._memory[start:stop]


class PartImage:
    """The bytes of a blob of some of the tensors of another, staged, one."""

    def __init__(self, part: BlobPlan, whole: BlobPlan, image: StagedImage) -> None:
        self.size = part.layout.size
        self._header = part.layout.header
        self._entries = part.layout.entries
        self._starts = [entry.start for entry in self._entries]
        staged = {entry.name: image.address + entry.start for entry in whole.layout.entries}
        self._addresses = [staged[entry.name] for entry in self._entries]

    def view(self, start: int, stop: int, buffer: memoryview) -> memoryview:
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        if start < len(self._header):
            ctypes.memmove(address, self._header[start:stop], len(self._header[start:stop]))
        number = max(bisect_right(self._starts, start) - 1, 0)
        while number < len(self._entries) and self._entries[number].start < stop:
            entry = self._entries[number]
            first, last = max(start, entry.start), min(stop, entry.stop)
            if first < last:
                ctypes.memmove(address + first - start, self._addresses[number] + first - entry.start, last - first)
            number += 1
        return buffer[: stop - start]


def part_of(part: BlobPlan, whole: BlobPlan, image: Image) -> Image:
    """The image of a blob of some of the tensors of `whole`: out of the staged bytes, or out of the live tensors."""
    return PartImage(part, whole, image) if isinstance(image, StagedImage) else LiveImage(Source(part))


class Arena:
    """Host memory for one snapshot, kept and used again. One snapshot at a time: whoever stages waits for the last.

    Args:
        device: what copies the tensors that are not the host's; CUDA where it is None.
    """

    def __init__(self, device: Device | None = None) -> None:
        self.device = Cuda() if device is None else device
        self.memories = 0
        """How often memory was got."""
        self.copied_bytes = 0
        """Bytes that were copied into it, in all."""
        self._memory: Memory | None = None
        self._pinned: Memory | None = None
        self._lent: Callable[[], Any] = _nobody
        self._rest: Staging | None = None

    @property
    def size(self) -> int:
        """Bytes held."""
        return 0 if self._memory is None else self._memory.size

    def reserve(self, plans: Sequence[BlobPlan]) -> None:
        """Have memory for `plans`."""
        self._reserved(sum(_room(plan) for plan in plans))

    def lend(self, size: int) -> ctypes.Array[ctypes.c_char]:
        """Memory of `size` bytes, for a snapshot: as long as somebody holds it, it is not used again."""
        lent = (ctypes.c_char * max(size, 1)).from_buffer(self._reserved(size).bytes)
        self._lent = weakref.ref(lent)
        return lent

    def _reserved(self, needed: int) -> Memory:
        if self._rest is not None:  # of a save that was interrupted: nobody else has waited for it
            self._rest.exception()
            self._rest = None
        if self._lent() is not None:  # a plugin has kept what it was given: it shall have it
            self._memory, self._pinned, self._lent = None, None, _nobody
        if self._memory is None or self._memory.size < needed:
            self._memory = self._pinned = None  # give back the old one first
            self._memory = Memory(needed)
            self.memories += 1
        return self._memory

    def touch(self) -> None:
        """Have every page there, so that the first snapshot does not pay for it. This can take seconds."""
        if self._memory is not None:
            ctypes.memset(self._memory.address, 0, self._memory.size)

    def stage(
        self, plans: Sequence[BlobPlan], threads: Executor, workers: int, later: Sequence[set[int]] = ()
    ) -> tuple[list[StagedImage], Staging | None]:
        """Copy everything but the rows in `later` (for each plan). When this returns, the other tensors may change.

        Returns:
            The images, and what is still being copied, if anything: the images are whole once it has ended.
        """
        memory = self._reserved(sum(_room(plan) for plan in plans))
        images: list[StagedImage] = []
        batch = Batch(self.device)
        offset = 0
        for number, plan in enumerate(plans):
            image = StagedImage(plan, memory.bytes[offset : offset + _room(plan)], memory.address + offset)
            _add_blob(batch, plan, image.address, later[number] if later else set())
            images.append(image)
            offset += _room(plan)
        return images, self.copy(batch, threads, workers)

    def copy(self, batch: Batch, threads: Executor, workers: int) -> Staging | None:
        """Copy what `batch` has for now, and begin the rest."""
        if batch.on_device and self._memory is not None and self._pinned is not self._memory:
            self.device.pin(self._memory)
            self._pinned = self._memory
        self.copied_bytes += batch.bytes
        self._rest = batch.run(self._memory, threads, workers)
        return self._rest


def _nobody() -> None:
    return None


def _room(plan: BlobPlan) -> int:
    return -(-plan.layout.size // mmap.PAGESIZE) * mmap.PAGESIZE


def _add_blob(batch: Batch, plan: BlobPlan, address: int, later: set[int]) -> None:
    """All of a blob: the device's tensors each, of the rest neighbours of one kind together, the header at once."""
    source, takes = Source(plan), batch.device.takes
    begin, end, waited = 0, len(plan.layout.header), False
    for row, (entry, tensor) in enumerate(zip(plan.layout.entries, plan.tensors, strict=True)):
        waits = row in later
        of_device = takes(tensor) and entry.size > 0
        if waits:
            name = f"{plan.group}.{entry.name}" if plan.group and not plan.group.endswith(".") else entry.name
            batch.watch(name, tensor, address + entry.start, of_device)
        if of_device or waits != waited:
            batch.by_host(source, begin, end, address, waited)
            begin, waited = end, waits
        if of_device:
            batch.by_device(tensor, address + entry.start, waits)
            begin = entry.stop
        end = entry.stop
    batch.by_host(source, begin, end, address, waited)
