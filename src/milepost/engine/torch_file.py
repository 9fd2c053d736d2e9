"""torch's zip file as an image: the container by torch itself, the tensors' bytes straight from their memory.

`torch.save` alone writes about a third as fast as the disk takes it, from one thread. Here it lays out the archive
without the tensors (``skip_data``), and the engine's threads copy, digest and write them, with true checksums.
"""

from __future__ import annotations

import ctypes
import io
import os
import pickle
import sys
import zipfile
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import IO, Any

import torch
from isal import isal_zlib

from milepost.engine.requests import CHUNK_BYTES
from milepost.engine.writer import BlobWriting, Workers
from milepost.format import sealed, zip_layout
from milepost.format.zip_layout import Hole
from milepost.storage.store import ExistingFile

THREADS = 3
"""Two keep the disk busy while one copies."""


class TorchFileImage:
    """All of a sealed torch file up to the archive's directory. `tail` gives the rest.

    The caller keeps the tensors alive and unchanged until it is written.
    """

    def __init__(self, container: IO[bytes], archive: zipfile.ZipFile, addresses: Mapping[str, int]) -> None:
        folder = archive.namelist()[0].split("/")[0]
        self.size: int = archive.start_dir
        self._holes = zip_layout.holes(container, archive, f"{folder}/data/")
        self._records = {
            hole.name: RecordChecksum(hole.stop - hole.start, addresses[hole.name]) for hole in self._holes
        }
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
                    target = buffer[first - start : last - start]
                    self._records[part.name].copy(first - begin, last - begin, target, address + first - start)
                else:
                    self._complete(number)
                    piece = bytes(part[first - begin : last - begin])
                    ctypes.memmove(address + first - start, piece, len(piece))
            number += 1
        return buffer[: stop - start]

    def _complete(self, number: int) -> None:
        """Put the checksum of the record before this part into it."""
        begin, _, part = self._parts[number]
        before = self._parts[number - 1][2] if number else None
        if isinstance(before, Hole) and isinstance(part, bytearray):
            place = before.checksum - begin
            part[place : place + 4] = self._records[before.name].value().to_bytes(4, "little")

    @property
    def bytes_read_again(self) -> int:
        """Bytes of tensors that were read for a checksum alone."""
        return sum(record.read_again for record in self._records.values())

    def tail(self, digests: str) -> bytes:
        checksums = {name: record.value() for name, record in self._records.items()}
        directory = zip_layout.with_checksums(self._directory, checksums)
        return sealed.tail(self.size, directory, [digests[n : n + 32] for n in range(0, len(digests), 32)])


class RecordChecksum:
    """The CRC-32 of a record, made of the parts that are copied: each is in the processor's cache at that moment.

    The zip wants it right behind the record's last byte, and chunks are copied by several threads: what no thread has
    copied when it is asked for is read once more, which is at most what the other threads have in hand.
    """

    def __init__(self, size: int, address: int) -> None:
        self._size = size
        self._address = address
        self._parts: dict[int, tuple[int, int]] = {}  # by first byte: behind the last one, and CRC
        self._known: int | None = None
        self.read_again = 0

    def copy(self, start: int, stop: int, target: memoryview, address: int) -> None:
        """Copy a part of the record into `target`, which lies at `address`."""
        checksum = 0
        for begin in range(start, stop, _CACHED_BYTES):
            end = min(begin + _CACHED_BYTES, stop)
            ctypes.memmove(address + begin - start, self._address + begin, end - begin)
            checksum = isal_zlib.crc32(target[begin - start : end - start], checksum)
        self._parts[start] = stop, checksum

    def value(self) -> int:
        """The checksum of the whole record."""
        if self._known is None:
            done, checksum = 0, 0
            for start, (stop, part) in sorted(self._parts.copy().items()):
                checksum = isal_zlib.crc32_combine(self._read(done, start, checksum), part, stop - start)
                done = stop
            self._known = self._read(done, self._size, checksum)
        return self._known

    def _read(self, start: int, stop: int, checksum: int) -> int:
        if start == stop:
            return checksum
        self.read_again += stop - start
        return isal_zlib.crc32((ctypes.c_char * (stop - start)).from_address(self._address + start), checksum)


_CACHED_BYTES = 256 << 10
"""What stays in the cache of a core from its copy to its checksum."""


def image_of(plain: Any) -> TorchFileImage | None:
    """The image of `plain` as `torch.save` would write it. None where that cannot be had: save it through torch then.

    That is so for tensors that are not in the host's memory, for those inside of pickled objects, for machines that
    are not little-endian or have no memory files.
    """
    if sys.byteorder != "little" or not hasattr(os, "memfd_create"):
        return None
    storages: dict[int, torch.UntypedStorage] = {}
    try:
        if not _find(plain, storages):
            return None
    except RecursionError:  # it contains itself
        return None
    with os.fdopen(os.memfd_create("milepost-container", os.MFD_CLOEXEC), "w+b") as container:
        with torch.serialization.skip_data():
            torch.save(plain, container)
        container.flush()
        try:
            with zipfile.ZipFile(container) as archive:
                addresses = _addresses(archive, [*storages.values()])
                return None if addresses is None else TorchFileImage(container, archive, addresses)
        except ValueError:
            return None


def _addresses(archive: zipfile.ZipFile, storages: Sequence[torch.UntypedStorage]) -> dict[str, int] | None:
    """The memory of each record. torch numbers the records by when it first comes to their storage."""
    folder = archive.namelist()[0].split("/")[0]
    records = {i.filename: i.file_size for i in archive.infolist() if i.filename.startswith(f"{folder}/data/")}
    names = {f"{folder}/data/{number}": storage for number, storage in enumerate(storages)}
    if records != {name: storage.nbytes() for name, storage in names.items()}:
        return None
    return {name: storage.data_ptr() for name, storage in names.items()}


def write(image: TorchFileImage, descriptor: int) -> None:
    """Write into the open file and make it durable."""
    workers = Workers(THREADS if image.size > CHUNK_BYTES else 1)
    try:
        BlobWriting(ExistingFile(), workers).run([(f"/proc/self/fd/{descriptor}", image)])
    finally:
        workers.close()


def _find(value: Any, storages: dict[int, torch.UntypedStorage]) -> bool:
    """Find the storages of all tensors, each once, in the order in which `torch.save` comes to them.

    False where that order cannot be known: something in `value` may hold tensors that are not seen from here.
    """
    kind = type(value)
    if kind in _WITHOUT_TENSORS:
        return True
    if kind in _ORDINARY:
        if value.device.type != "cpu" or value.layout is not torch.strided or value.__dict__:
            return False
        storage = value.untyped_storage()
        storages.setdefault(storage._cdata, storage)
        return True
    if kind in (dict, OrderedDict, Counter):
        # what hangs on a dict, as `_metadata` does on the state dict of a module, is pickled after its items
        values = (*value.values(), *getattr(value, "__dict__", {}).values())
        return all(map(_without_tensors, value)) and all(_find(item, storages) for item in values)
    if kind in (list, tuple):
        return all(_find(item, storages) for item in value)
    return _without_tensors(value)


def _without_tensors(value: Any) -> bool:
    """Whether the pickle of `value` holds no tensor, however deep."""
    if type(value) in _WITHOUT_TENSORS:
        return True
    try:
        _Looking(io.BytesIO(), protocol=2).dump(value)
    except Exception:  # a tensor, or it cannot be pickled, which torch will say better
        return False
    return True


class _Looking(pickle.Pickler):
    def persistent_id(self, value: Any) -> None:
        if isinstance(value, (torch.Tensor, torch.TypedStorage, torch.UntypedStorage)):
            raise ValueError("a tensor")


_ORDINARY = (torch.Tensor, torch.nn.Parameter)
_WITHOUT_TENSORS = frozenset(
    (type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype, torch.device, torch.layout)
)
