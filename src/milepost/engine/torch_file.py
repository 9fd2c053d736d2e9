"""torch's zip file as an image: the container by torch itself, the tensors' bytes straight from their memory.

`torch.save` alone writes about a third as fast as the disk takes it, from one thread. Here it lays out the archive
without the tensors (``skip_data``), and the engine's threads copy, digest and write them, with true checksums.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import zipfile
from bisect import bisect_right
from typing import IO, Any

import torch
from isal import isal_zlib

from milepost.engine.requests import CHUNK_BYTES
from milepost.engine.writer import BlobWriting, Workers
from milepost.format import sealed, torch_zip, zip_layout
from milepost.format.zip_layout import Hole
from milepost.storage.store import ExistingFile

_THREADS = 2


class TorchFileImage:
    """All of a sealed torch file up to the archive's directory. `tail` gives the rest.

    The caller keeps the tensors alive and unchanged until it is written.
    """

    def __init__(self, container: IO[bytes], archive: zipfile.ZipFile, addresses: dict[str, int]) -> None:
        folder = archive.namelist()[0].split("/")[0]
        self.size: int = archive.start_dir
        self._holes = zip_layout.holes(container, archive, f"{folder}/data/")
        self._addresses = addresses
        self._checksums: dict[str, int] = {}
        self._lock = threading.Lock()
        self._parts: list[tuple[int, int, Hole | bytearray]] = []
        self._fill(container)
        self._starts = [start for start, _, _ in self._parts]
        container.seek(self.size)
        self._directory = container.read()

    def _fill(self, container: IO[bytes]) -> None:
        place = 0
        for hole in [*self._holes, None]:
            stop = self.size if hole is None else hole.start
            if stop > place:
                container.seek(place)
                self._parts.append((place, stop, bytearray(container.read(stop - place))))
            if hole is not None:
                self._parts.append((hole.start, hole.stop, hole))
                place = hole.stop

    def view(self, start: int, stop: int, buffer: memoryview) -> memoryview:
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        number = max(bisect_right(self._starts, start) - 1, 0)
        while number < len(self._parts) and self._parts[number][0] < stop:
            begin, end, part = self._parts[number]
            first, last = max(start, begin), min(stop, end)
            if first < last:
                if isinstance(part, Hole):
                    source = self._addresses[part.name] + first - begin
                    ctypes.memmove(address + first - start, source, last - first)
                else:
                    self._complete(number)
                    piece = bytes(part[first - begin : last - begin])
                    ctypes.memmove(address + first - start, piece, len(piece))
            number += 1
        return buffer[: stop - start]

    def _complete(self, number: int) -> None:
        """Put the checksum of the record before this part into it. It covers the whole record, which may be long."""
        begin, _, part = self._parts[number]
        before = self._parts[number - 1][2] if number else None
        if isinstance(before, Hole) and isinstance(part, bytearray):
            place = before.checksum - begin
            part[place : place + 4] = self._checksum(before).to_bytes(4, "little")

    def _checksum(self, hole: Hole) -> int:
        with self._lock:
            known = self._checksums.get(hole.name)
        if known is None:
            memory = (ctypes.c_char * (hole.stop - hole.start)).from_address(self._addresses[hole.name])
            known = isal_zlib.crc32(memory)
            with self._lock:
                self._checksums[hole.name] = known
        return known

    def tail(self, digests: str) -> bytes:
        checksums = {hole.name: self._checksum(hole) for hole in self._holes}
        directory = zip_layout.with_checksums(self._directory, checksums)
        return sealed.tail(self.size, directory, [digests[n : n + 32] for n in range(0, len(digests), 32)])


def image_of(plain: Any) -> TorchFileImage | None:
    """The image of `plain` as `torch.save` would write it. None where that cannot be had: save it through torch then.

    That is so for tensors that are not in the host's memory, for those inside of pickled objects, for machines that
    are not little-endian or have no memory files.
    """
    if sys.byteorder != "little" or not hasattr(os, "memfd_create") or not _all_in_memory(plain):
        return None
    with os.fdopen(os.memfd_create("milepost-container", os.MFD_CLOEXEC), "w+b") as container:
        with torch.serialization.skip_data():
            torch.save(plain, container)
        container.flush()
        try:
            described = torch_zip.contents(container)
            with zipfile.ZipFile(container) as archive:
                addresses: dict[str, int] = {}
                if not _find(plain, described, addresses):
                    return None
                folder = archive.namelist()[0].split("/")[0]
                records = [i for i in archive.infolist() if i.filename.startswith(f"{folder}/data/")]
                if any(record.file_size and record.filename not in addresses for record in records):
                    return None
                return TorchFileImage(container, archive, addresses)
        except ValueError:
            return None


def write(image: TorchFileImage, descriptor: int) -> None:
    """Write into the open file and make it durable."""
    workers = Workers(_THREADS if image.size > CHUNK_BYTES else 1)
    try:
        BlobWriting(ExistingFile(), workers).run([(f"/proc/self/fd/{descriptor}", image)])
    finally:
        workers.close()


def _all_in_memory(value: Any) -> bool:
    """Whether every tensor in the containers is an ordinary one in the host's memory."""
    if isinstance(value, torch.Tensor):
        return type(value) in _ORDINARY and value.device.type == "cpu" and value.layout is torch.strided
    if isinstance(value, dict):
        return all(map(_all_in_memory, value.values()))
    return not isinstance(value, (list, tuple)) or all(map(_all_in_memory, value))


_ORDINARY = (torch.Tensor, torch.nn.Parameter)


def _find(value: Any, described: Any, addresses: dict[str, int]) -> bool:
    """Find the memory of each record. False where the two do not match."""
    if isinstance(value, torch.Tensor):
        if not isinstance(described, torch_zip.StoredTensor):
            return False
        addresses[described.record] = value.untyped_storage().data_ptr()
        return True
    if isinstance(value, dict):
        if not isinstance(described, dict) or len(described) != len(value):
            return False
        return all(_find(a, b, addresses) for a, b in zip(value.values(), described.values(), strict=True))
    if isinstance(value, (list, tuple)) and isinstance(described, (list, tuple)):
        return len(value) == len(described) and all(
            _find(a, b, addresses) for a, b in zip(value, described, strict=True)
        )
    return True
