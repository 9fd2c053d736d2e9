"""A safetensors file of one flat dict of tensors: written as everything is, read and checked without trust."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from milepost.engine.planner import plan_blob
from milepost.engine.requests import CHUNK_BYTES
from milepost.engine.staging import LiveImage, Source
from milepost.engine.state import DTYPES, Flattened
from milepost.engine.writer import BlobWriting, Workers, piece_digests
from milepost.errors import CheckpointCorruptError, CheckpointFormatError
from milepost.format.layout import ITEM_BYTES, piece_count
from milepost.format.safetensors import read_header
from milepost.storage.store import ExistingFile

_TORCH = {name: dtype for dtype, name in DTYPES.items()}


def write(
    tensors: Mapping[str, torch.Tensor], metadata: dict[str, str], descriptor: int, threads: int = 2
) -> tuple[str, dict[str, str]]:
    """Write the open, empty file, and make it durable.

    Returns:
        The digests of its pieces, and for each name whose tensor another name has already the name it is stored under.
    """
    flattened = Flattened({"": dict(tensors)})
    plan = plan_blob("", "", flattened.leaves, metadata).bound(flattened.tensors)
    stored = {leaf.number: leaf.name for leaf in flattened.leaves}
    refs = flattened.tree(lambda number: (0, number))[""]
    tied = {name: stored[ref.row] for name, ref in refs.items() if stored[ref.row] != name}
    workers = Workers(threads if plan.layout.size > CHUNK_BYTES else 1)
    try:
        (digests,) = BlobWriting(ExistingFile(), workers).run(
            [(f"/proc/self/fd/{descriptor}", LiveImage(Source(plan)))]
        )
    finally:
        workers.close()
    return digests, tied


class SafetensorsFile:
    """The header of a file, checked. Raises CheckpointFormatError where it is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        try:
            with path.open("rb") as file:
                self._base, self.metadata, tensors = read_header(file, self.size)
            self.entries = {name: self._entry(item) for name, item in tensors.items()}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointFormatError(f"{path} is no safetensors file: {error}.") from error

    def _entry(self, item: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
        dtype, shape = item["dtype"], tuple(map(int, item["shape"]))
        start, stop = (self._base + int(n) for n in item["data_offsets"])
        if dtype not in _TORCH:
            raise ValueError(f"the type {dtype!r} is not known")
        if min(shape, default=0) < 0 or stop - start != ITEM_BYTES[dtype] * math.prod(shape):
            raise ValueError(f"{stop - start} bytes for {dtype} of shape {list(shape)}")
        if not self._base <= start <= stop <= self.size:
            raise ValueError(f"a tensor at bytes {start} to {stop} of {self.size}")
        return _TORCH[dtype], shape, start, stop

    def read(self) -> dict[str, torch.Tensor]:
        """All tensors, in new memory."""
        found = {}
        with self.path.open("rb") as file:
            for name, (dtype, shape, start, stop) in self.entries.items():
                flat = torch.empty(stop - start, dtype=torch.uint8)
                file.seek(start)
                if stop > start and file.readinto(flat.numpy().data) != stop - start:
                    raise CheckpointCorruptError(f"{self.path} was cut short.", path=str(self.path), tensor=name)
                found[name] = flat.view(dtype).reshape(shape) if stop > start else torch.empty(shape, dtype=dtype)
        return found

    def verify(self, digests: str) -> None:
        """Compare every byte with the digests of its pieces. Raises CheckpointCorruptError."""
        if len(digests) != 32 * piece_count(self.size):
            raise self._corrupt(0, self.size)
        with self.path.open("rb") as file:
            for start in range(0, self.size, CHUNK_BYTES):
                found = piece_digests(memoryview(file.read(CHUNK_BYTES)))
                first = 32 * piece_count(start)
                for n in range(0, len(found), 32):
                    if found[n : n + 32] != digests[first + n : first + n + 32]:
                        begin = start + n // 32 * (1 << 20)
                        raise self._corrupt(begin, min(begin + (1 << 20), self.size))

    def _corrupt(self, start: int, stop: int) -> CheckpointCorruptError:
        names = [name for name, (_, _, low, high) in self.entries.items() if low < stop and high > start]
        return CheckpointCorruptError(
            f"{self.path} is damaged in bytes {start} to {stop}, in {', '.join(names[:5]) or 'its header'}. Resume from"
            " an older checkpoint.",
            path=str(self.path),
            tensor=names[0] if names else None,
            byte_range=(start, stop),
        )
