"""One blob as it lies on the disk, opened for reading: past the page cache unless it is in there already."""

from __future__ import annotations

import os
import stat
import threading
from contextlib import suppress

from milepost.errors import CheckpointCorruptError
from milepost.format.manifest import Blob, Index
from milepost.storage.store import ALIGN_BYTES

_NOWAIT = getattr(os, "RWF_NOWAIT", 0)


class BlobFile:
    """One blob, read past the page cache unless it is in there already."""

    def __init__(self, directory: int, blob: Blob, path: str) -> None:
        self.size = blob.bytes
        try:
            self._cached = open_in(directory, blob.name, path)
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

    def __enter__(self) -> BlobFile:
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


class BlobReading:
    """A blob from which several threads read `runs` ranges in all: opened for the first, closed after the last."""

    def __init__(self, number: int, index: Index, blob: Blob, runs: int) -> None:
        self.number = number
        self.index = index
        self.blob = blob
        self._left = runs
        self._file: BlobFile | None = None
        self._lock = threading.Lock()

    def file(self, directory: int, path: str) -> BlobFile:
        with self._lock:
            if self._file is None:
                self._file = BlobFile(directory, self.blob, path)
            return self._file

    def done(self) -> None:
        """One range more is read, or given up."""
        with self._lock:
            self._left -= 1
            if self._left == 0 and self._file is not None:
                self._file.close()
                self._file = None


def open_in(directory: int, name: str, path: str) -> int:
    """Open a file of the directory `directory`, which is called `path` in errors; never through a link.

    Raises:
        FileNotFoundError: it is not there.
        CheckpointCorruptError: it cannot be read, or is no regular file.
    """
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
