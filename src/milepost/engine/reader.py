"""Opening a checkpoint directory and reading tensors out of it: every piece verified before its bytes go anywhere."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from operator import itemgetter
from typing import Any

import msgspec

from milepost.engine.blob_file import BlobFile, BlobReading, open_in
from milepost.engine.commit import REPLACED, Identity, identity
from milepost.engine.copying import copy_in
from milepost.engine.requests import CHUNK_BYTES, Destination
from milepost.engine.writer import Workers, piece_digests
from milepost.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
)
from milepost.format import codec, manifest
from milepost.format.layout import PIECE_BYTES, pieces_of
from milepost.format.manifest import Blob, Head, Index, Stored
from milepost.format.regions import touched

READ_ATTEMPTS = 20
"""How often a checkpoint that is replaced while it is read is read anew. Only savers that do nothing else need many."""

_Run = tuple[int, int, list[Destination]]
"""First byte, behind the last one, and what takes a part of these bytes."""
_START = itemgetter(0)


class StoredCheckpoint:
    """A committed checkpoint directory, opened. The directory is held open: replacing it does not disturb a reader.

    Raises:
        CheckpointNotFoundError: nothing is there.
        CheckpointFormatError: it is no checkpoint directory, or a newer one.
        CheckpointCorruptError: the head is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.bytes_read = 0
        self.ranges_read: list[tuple[int, int, int]] = []  # of blobs: number, first byte, behind the last one
        for left in reversed(range(READ_ATTEMPTS)):
            self._directory = _open_directory(self.path)
            try:
                data = self._head_bytes()
                self.commit = manifest.digest(data)  # tells it from any other that lay or will lie at its path
                self.head: Head = manifest.decode_head(data, self._in(manifest.HEAD_NAME))
                if (listing := self.head.listing) is not msgspec.UNSET:
                    self.head = manifest.decode_listing(self._stored(listing), self.head, self._in(listing.name))
                break
            except BaseException as error:
                replaced = isinstance(error, CheckpointError) and not self.is_current()
                self.close()
                if left == 0 or not replaced:
                    raise
        self._lock = threading.Lock()
        self._indexes: dict[int, Index] = {}

    def close(self) -> None:
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    def __enter__(self) -> StoredCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def identities(self) -> dict[str, Identity]:
        """All the files it consists of, the head last.

        Raises:
            CheckpointCorruptError: one is missing.
        """
        try:
            return {name: identity(name, self._directory) for name in self.head.files()}
        except OSError as error:
            raise CheckpointCorruptError(f"A file of {self.path} is missing: {error}.", path=self.path) from error

    def is_current(self) -> bool:
        """Whether the directory that is held open still lies at its path: neither replaced nor removed meanwhile."""
        try:
            return os.path.samestat(os.fstat(self._directory), os.stat(self.path))  # noqa: PTH116
        except OSError:
            return False

    @cached_property
    def tree(self) -> Any:
        """The decoded tree: plain values, `TensorRef`, `PartsRef`, `RanksRef` and `Tagged`."""
        path = self._in(self.head.tree.name)
        tree = codec.decode(self._stored(self.head.tree), path)
        if not isinstance(tree, dict):
            raise CheckpointFormatError(f"{path} holds a {type(tree).__name__}, not the names of a state.")
        return tree

    def rank_tree(self, rank: int) -> list[Any]:
        """The values that were rank `rank`'s own, in the order of the numbers in `RanksRef`.

        Raises:
            CheckpointFormatError: there is no such rank, or its file holds something else.
        """
        trees = self.head.rank_trees()
        if rank >= len(trees):
            raise CheckpointFormatError(f"{self.path}: the tree refers to values of rank {rank} of {len(trees)}.")
        path = self._in(trees[rank].name)
        values = codec.decode(self._stored(trees[rank]), path)
        if not isinstance(values, list):
            raise CheckpointFormatError(f"{path} holds a {type(values).__name__}, not a list of values.")
        try:
            found: list[Any] = codec.renumbered(
                values, [n for n, blob in enumerate(self.head.blobs) if blob.rank == rank]
            )
        except IndexError:
            raise CheckpointFormatError(f"{path} refers to a blob that rank {rank} has not written.") from None
        return found

    def index(self, blob: int) -> Index:
        """The index of a blob, checked."""
        if blob not in self._indexes:
            if blob >= len(self.head.blobs):
                raise CheckpointFormatError(f"{self.path}: the tree refers to blob {blob} of {len(self.head.blobs)}.")
            described = self.head.blobs[blob]
            BlobFile(self._directory, described, self._in(described.name)).close()  # before memory for it is asked for
            data = self._stored(described.index)
            self._indexes[blob] = manifest.decode_index(
                data, described.index, described, self._in(described.index.name)
            )
        return self._indexes[blob]

    def read(self, wanted: Mapping[int, Sequence[Destination]], workers: Workers) -> None:
        """Read from blobs, by their number, into memory. Each piece is read once, verified, then copied.

        Raises:
            CheckpointCorruptError: names the first tensor that a damaged piece holds, and the range of bytes. What
                other pieces held may have been copied already.
        """
        tasks: list[tuple[BlobReading, _Run]] = []
        for number, destinations in wanted.items():
            index, blob = self.index(number), self.head.blobs[number]
            runs = _runs(sorted((d for d in destinations if d.run), key=_START), index.bytes)
            reading = BlobReading(number, index, blob, len(runs))
            tasks += [(reading, run) for run in runs]
        errors: list[BaseException] = []

        def work(task: tuple[BlobReading, _Run]) -> None:
            reading, run = task
            try:
                if not errors:
                    self._read_run(reading, run, workers.buffer())
            except BaseException as error:
                errors.append(error)
            finally:
                reading.done()

        if len(tasks) == 1:
            work(tasks[0])
        else:
            list(workers.pool.map(work, tasks))
        if errors:
            raise errors[0]

    def verify(self, workers: Workers) -> None:
        """Read every byte that belongs to the checkpoint and compare it with its digest.

        Raises:
            CheckpointCorruptError: at the first that differs.
        """
        self.tree  # noqa: B018  # reading it is verifying it
        for stored in (*self.head.maps, *self.head.rank_trees()):
            self._stored(stored)
        for number, blob in enumerate(self.head.blobs):
            index = self.index(number)
            reading = BlobReading(number, index, blob, 1)
            with BlobFile(self._directory, blob, self._in(blob.name)) as file:

                def check(start: int, file: BlobFile = file, reading: BlobReading = reading) -> None:
                    self._pieces(file, reading, start, min(start + CHUNK_BYTES, reading.blob.bytes), workers.buffer())

                list(workers.pool.map(check, range(0, blob.bytes, CHUNK_BYTES)))

    # ---- pieces ----------------------------------------------------------------------------------------------------

    def _read_run(self, reading: BlobReading, run: _Run, buffer: memoryview) -> None:
        start, stop, wanted = run
        file = reading.file(self._directory, self._in(reading.blob.name))
        # a warm file is read piece by piece: each is still in the processor's cache when it is digested and copied
        step = PIECE_BYTES if file.warm(start, buffer) else CHUNK_BYTES
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        first = 0
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            self._pieces(file, reading, begin, end, buffer)
            while first < len(wanted) and wanted[first].stop <= begin:
                first += 1
            for destination in wanted[first:]:
                if destination.start >= end:
                    break
                copy_in(destination, begin, end, address)

    def _pieces(self, file: BlobFile, reading: BlobReading, start: int, stop: int, buffer: memoryview) -> None:
        """Read and verify whole pieces into `buffer`."""
        count = file.read(start, stop, buffer)
        with self._lock:
            self.bytes_read += count
            self.ranges_read.append((reading.number, start, stop))
        found = piece_digests(buffer[:count])
        first = start // PIECE_BYTES
        expected = reading.index.digests[32 * first : 32 * (first + -(-(stop - start) // PIECE_BYTES))]
        if found != expected or count != stop - start:
            raise self._corrupt(reading.index, reading.blob, first, found, expected)

    def _corrupt(self, index: Index, blob: Blob, first: int, found: str, expected: str) -> CheckpointCorruptError:
        pairs = range(0, len(expected), 32)
        bad = next((n for n in pairs if found[n : n + 32] != expected[n : n + 32]), 0) // 32 + first
        low, high = bad * PIECE_BYTES, min((bad + 1) * PIECE_BYTES, blob.bytes)
        touched = [e for e in map(index.entry, range(len(index.names))) if e.start < high and e.stop > low]
        names = [_key_path(blob, entry.name) for entry in touched]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        place = "the tensor" if len(names) == 1 else "the piece that holds the tensors"
        what = f"in {place} {', '.join(names[:5])}{more}" if names else "in its header"
        return CheckpointCorruptError(
            f"{self._in(blob.name)} is damaged in bytes {low} to {high}, {what}. Resume from an older checkpoint.",
            path=self._in(blob.name),
            tensor=names[0] if names else None,
            byte_range=(low, high),
        )

    # ---- small files -----------------------------------------------------------------------------------------------

    def _in(self, name: str) -> str:
        return f"{self.path}/{name}"

    def _head_bytes(self) -> bytes:
        try:
            return self._whole(manifest.HEAD_NAME, manifest.HEAD_MAX_BYTES)
        except FileNotFoundError:
            raise CheckpointFormatError(
                f"{self.path} is no checkpoint: it has no {manifest.HEAD_NAME}. A save that was killed leaves such a"
                " directory, and so does a copy that was cut short."
            ) from None

    def _stored(self, stored: Stored) -> bytes:
        path = self._in(stored.name)
        try:
            data = self._whole(stored.name, stored.bytes)
        except FileNotFoundError:
            raise CheckpointCorruptError(f"{path} is missing. Resume from an older checkpoint.", path=path) from None
        manifest.check_stored(data, stored, path)
        return data

    def _whole(self, name: str, limit: int) -> bytes:
        """A small file, through the directory held open, never through a link; at most a byte more than `limit`."""
        descriptor = open_in(self._directory, name, self._in(name))
        with os.fdopen(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            data = file.read(min(limit, size) + 1)
        self.bytes_read += len(data)
        return data


def _open_directory(path: str) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    parent, name = os.path.split(path)
    try:
        # Where directories cannot be swapped in one step, the old one is aside while a new one takes its place.
        for place in (path, f"{parent}/{REPLACED}{name}"):
            with suppress(FileNotFoundError):
                return os.open(place, flags)
        return os.open(path, flags)
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"There is no checkpoint at {path}.") from None
    except NotADirectoryError:
        raise CheckpointFormatError(f"{path} is no checkpoint directory.") from None
    except OSError as error:
        raise CheckpointCorruptError(f"{path} cannot be read: {error}.", path=path) from error


def _key_path(blob: Blob, name: str) -> str:
    """Of a tensor in the state. The shared blob's names begin with their group; tensors at the top have none."""
    return name if blob.group in ("", "rest.", "rank.") else f"{blob.group}.{name}"


def _runs(wanted: Sequence[Destination], size: int) -> list[_Run]:
    """Runs of consecutive pieces, at most a chunk long, with the destinations that each run may hold a part of."""
    pieces = sorted({n for span in _merged(wanted) for n in pieces_of(*span)})
    runs: list[_Run] = []
    spans: list[list[int]] = []
    for number in pieces:
        if spans and spans[-1][1] == number and (number - spans[-1][0]) * PIECE_BYTES < CHUNK_BYTES:
            spans[-1][1] = number + 1
        else:
            spans.append([number, number + 1])
    first = 0
    for low, high in spans:
        start, stop = low * PIECE_BYTES, min(high * PIECE_BYTES, size)
        while first < len(wanted) and wanted[first].stop <= start:
            first += 1
        inside = []
        for destination in wanted[first:]:
            if destination.start >= stop:
                break
            inside.append(destination)
        runs.append((start, stop, inside))
    return runs


def _merged(wanted: Iterable[Destination]) -> list[tuple[int, int]]:
    """The ranges of bytes that are wanted, those that meet as one."""
    spans: list[tuple[int, int]] = []
    for destination in wanted:
        start, stop, _, run, steps = destination
        for low, high in touched(start, run, steps) if steps else ((start, stop),):
            if spans and spans[-1][0] <= low <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(high, spans[-1][1]))
            else:
                spans.append((low, high))
    return spans
