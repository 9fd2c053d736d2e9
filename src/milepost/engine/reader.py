"""Opening a checkpoint directory and reading tensors out of it: every piece verified before its bytes go anywhere."""

from __future__ import annotations

import ctypes
import os
import stat
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import msgspec

from milepost.engine.commit import REPLACED, Identity, identity
from milepost.engine.requests import CHUNK_BYTES, Destination
from milepost.engine.writer import Workers, piece_digests
from milepost.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
)
from milepost.format import codec, manifest
from milepost.format.layout import PIECE_BYTES, TensorEntry, pieces_of
from milepost.format.manifest import Blob, Head, Index, Stored
from milepost.storage.store import ALIGN_BYTES

READ_ATTEMPTS = 20
"""How often a checkpoint that is replaced while it is read is read anew. Only savers that do nothing else need many."""
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)


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
        for left in reversed(range(READ_ATTEMPTS)):
            self._directory = _open_directory(self.path)
            try:
                self.head: Head = manifest.decode_head(self._head_bytes(), self._in(manifest.HEAD_NAME))
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
        return values

    def index(self, blob: int) -> Index:
        """The index of a blob, checked."""
        if blob not in self._indexes:
            if blob >= len(self.head.blobs):
                raise CheckpointFormatError(f"{self.path}: the tree refers to blob {blob} of {len(self.head.blobs)}.")
            described = self.head.blobs[blob]
            _BlobFile(self._directory, described, self._in(described.name)).close()  # before memory for it is asked for
            data = self._stored(described.index)
            self._indexes[blob] = manifest.decode_index(
                data, described.index, described, self._in(described.index.name)
            )
        return self._indexes[blob]

    def read(self, blob: int, wanted: Sequence[Destination], workers: Workers) -> None:
        """Read tensors of one blob into memory. Each piece is read once, verified, then copied.

        Raises:
            CheckpointCorruptError: names the first tensor that a damaged piece holds, and the range of bytes. What
                other pieces held may have been copied already.
        """
        index, described = self.index(blob), self.head.blobs[blob]
        wanted = sorted((w for w in wanted if w.entry.size), key=lambda w: w.entry.start)
        runs = _runs(wanted, index.bytes)
        with _BlobFile(self._directory, described, self._in(described.name)) as file:
            errors: list[BaseException] = []

            def work(run: tuple[int, int, list[Destination]]) -> None:
                if not errors:
                    try:
                        self._read_run(file, index, described, run, workers.buffer())
                    except BaseException as error:
                        errors.append(error)

            if len(runs) == 1:
                work(runs[0])
            else:
                list(workers.pool.map(work, runs))
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
            with _BlobFile(self._directory, blob, self._in(blob.name)) as file:

                def check(start: int, file: _BlobFile = file, index: Index = index, blob: Blob = blob) -> None:
                    self._pieces(file, index, blob, start, min(start + CHUNK_BYTES, blob.bytes), workers.buffer())

                list(workers.pool.map(check, range(0, blob.bytes, CHUNK_BYTES)))

    # ---- pieces ----------------------------------------------------------------------------------------------------

    def _read_run(
        self, file: _BlobFile, index: Index, blob: Blob, run: tuple[int, int, list[Destination]], buffer: memoryview
    ) -> None:
        start, stop, wanted = run
        # a warm file is read piece by piece: each is still in the processor's cache when it is digested and copied
        step = PIECE_BYTES if file.warm(start, buffer) else CHUNK_BYTES
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        first = 0
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            self._pieces(file, index, blob, begin, end, buffer)
            while first < len(wanted) and wanted[first].entry.stop <= begin:
                first += 1
            for destination in wanted[first:]:
                entry = destination.entry
                if entry.start >= end:
                    break
                low, high = max(begin, entry.start), min(end, entry.stop)
                ctypes.memmove(destination.address + low - entry.start, address + low - begin, high - low)

    def _pieces(self, file: _BlobFile, index: Index, blob: Blob, start: int, stop: int, buffer: memoryview) -> None:
        """Read and verify whole pieces into `buffer`."""
        count = file.read(start, stop, buffer)
        with self._lock:
            self.bytes_read += count
        found = piece_digests(buffer[:count])
        first = start // PIECE_BYTES
        expected = index.digests[32 * first : 32 * (first + -(-(stop - start) // PIECE_BYTES))]
        if found != expected or count != stop - start:
            raise self._corrupt(index, blob, first, found, expected)

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
        descriptor = _open_in(self._directory, name, self._in(name))
        with os.fdopen(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            data = file.read(min(limit, size) + 1)
        self.bytes_read += len(data)
        return data


class _BlobFile:
    """One blob, read past the page cache unless it is in there already."""

    def __init__(self, directory: int, blob: Blob, path: str) -> None:
        self.size = blob.bytes
        try:
            self._cached = _open_in(directory, blob.name, path)
        except FileNotFoundError:
            raise CheckpointCorruptError(f"{path} is missing. Resume from an older checkpoint.", path=path) from None
        self._direct = -1
        actual = os.fstat(self._cached).st_size
        if actual != blob.bytes:
            os.close(self._cached)
            raise CheckpointCorruptError(
                f"{path} has {actual} bytes, {blob.bytes} were written. Resume from an older checkpoint.",
                path=path,
                byte_range=(min(actual, blob.bytes), max(actual, blob.bytes)),
            )
        with suppress(OSError, AttributeError):
            self._direct = os.open(f"/proc/self/fd/{self._cached}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)

    def __enter__(self) -> _BlobFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._cached)
        if self._direct >= 0:
            os.close(self._direct)

    def warm(self, start: int, buffer: memoryview) -> bool:
        """Whether the bytes at `start` are in the page cache."""
        if not _NOWAIT or self._direct < 0:
            return self._direct < 0
        try:
            return os.preadv(self._cached, [buffer[:ALIGN_BYTES]], start, _NOWAIT) > 0
        except OSError:
            return False

    def read(self, start: int, stop: int, buffer: memoryview) -> int:
        """Read a range into `buffer`; returns how many bytes of it there were."""
        done = 0
        if self._direct >= 0 and not self._all_cached(start, stop, buffer):
            room = -(-(stop - start) // ALIGN_BYTES) * ALIGN_BYTES
            with suppress(OSError):  # a file system that takes the flag and then refuses: read below
                done = min(os.preadv(self._direct, [buffer[:room]], start), stop - start)
        elif self._direct >= 0:
            return stop - start
        while done < stop - start:
            count = os.preadv(self._cached, [buffer[done : stop - start]], start + done)
            if count == 0:
                break
            done += count
        return done

    def _all_cached(self, start: int, stop: int, buffer: memoryview) -> bool:
        """Read the range if all of it is in the page cache, without waiting for the disk."""
        if not _NOWAIT:
            return False
        try:
            return os.preadv(self._cached, [buffer[: stop - start]], start, _NOWAIT) == stop - start
        except OSError:
            return False


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
    return name if blob.group in ("", "rest.") else f"{blob.group}.{name}"


def _open_in(directory: int, name: str, path: str) -> int:
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointCorruptError(f"{path} cannot be read: {error}.", path=path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointCorruptError(f"{path} is no regular file.", path=path)
    return descriptor


def _runs(wanted: Sequence[Destination], size: int) -> list[tuple[int, int, list[Destination]]]:
    """Runs of consecutive pieces, at most a chunk long, with the tensors that each run holds a part of."""
    pieces = sorted({n for w in _merged(w.entry for w in wanted) for n in pieces_of(*w)})
    runs: list[tuple[int, int, list[Destination]]] = []
    spans: list[list[int]] = []
    for number in pieces:
        if spans and spans[-1][1] == number and (number - spans[-1][0]) * PIECE_BYTES < CHUNK_BYTES:
            spans[-1][1] = number + 1
        else:
            spans.append([number, number + 1])
    first = 0
    for low, high in spans:
        start, stop = low * PIECE_BYTES, min(high * PIECE_BYTES, size)
        while first < len(wanted) and wanted[first].entry.stop <= start:
            first += 1
        inside = []
        for destination in wanted[first:]:
            if destination.entry.start >= stop:
                break
            inside.append(destination)
        runs.append((start, stop, inside))
    return runs


def _merged(entries: Iterable[TensorEntry]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for entry in entries:
        if spans and entry.start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(entry.stop, spans[-1][1]))
        else:
            spans.append((entry.start, entry.stop))
    return spans
