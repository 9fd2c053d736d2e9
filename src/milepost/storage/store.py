"""The calls to the file system that a save is made of, one method each.

Everything durable that the engine does goes through a `Store`. `LocalStore` makes the system calls; a recorder around
it sees each write, fsync, rename, link and unlink, which is what the replay of crash states needs. Paths are absolute.
Bytes are written through a descriptor, in large aligned pieces, from buffers that the caller owns.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

ALIGN_BYTES = 4096
"""Direct I/O wants offsets, lengths and addresses in multiples of the device's block; 4 KiB suits the common ones."""

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Store(Protocol):
    """What a save needs of a file system. All raise OSError with the path."""

    def make_directory(self, path: str) -> None: ...

    def create(self, path: str, size: int) -> int:
        """A new file with `size` bytes of space reserved; returns its descriptor. FileExistsError: there is one."""

    def write(self, descriptor: int, data: memoryview, offset: int) -> None:
        """Write all of `data`. Aligned data in an aligned buffer goes past the page cache where the system can."""

    def finish(self, descriptor: int, size: int) -> None:
        """Cut the file to `size` bytes, make it read-only and durable, and close it, also where that fails."""

    def abandon(self, descriptor: int) -> None:
        """Close without making durable: the file is going to be removed."""

    def link(self, source: str, target: str) -> None:
        """Give a file a second name."""

    def rename(self, source: str, target: str) -> None:
        """Move a file or directory. A directory at `target` must be empty."""

    def exchange(self, one: str, other: str) -> None:
        """Swap two directories in one step. OSError with ENOTSUP where the file system cannot."""

    def remove_file(self, path: str) -> None: ...

    def remove_directory(self, path: str) -> None: ...

    def sync_directory(self, path: str) -> None:
        """Make the entries of a directory durable."""


class LocalStore:
    """The machine's own file system. Direct I/O where the file system takes it; where not, buffered and fsynced."""

    _created = os.O_CREAT | os.O_EXCL

    def __init__(self) -> None:
        self._buffered: set[int] = set()
        self._paths: dict[int, str] = {}  # of open files: the system's errors about a descriptor do not name it

    def make_directory(self, path: str) -> None:
        os.mkdir(path)  # noqa: PTH102  # this module is where the calls are made

    def create(self, path: str, size: int) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | self._created
        descriptor = -1
        if size >= ALIGN_BYTES and hasattr(os, "O_DIRECT"):
            try:
                descriptor = os.open(path, flags | os.O_DIRECT, 0o644)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
                if self._created:
                    with suppress(FileNotFoundError):  # some systems create the file before they refuse
                        os.unlink(path)  # noqa: PTH108
        if descriptor < 0:
            descriptor = os.open(path, flags, 0o644)
            self._buffered.add(descriptor)
        self._paths[descriptor] = path if self._created else os.path.realpath(path)
        try:
            with self._naming(descriptor):
                if size:
                    _reserve(descriptor, size)
        except BaseException:
            self.abandon(descriptor)
            raise
        return descriptor

    def write(self, descriptor: int, data: memoryview, offset: int) -> None:
        aligned = not (offset % ALIGN_BYTES or len(data) % ALIGN_BYTES)
        if not aligned and descriptor not in self._buffered:
            self._leave_direct(descriptor)
        while data:
            try:
                with self._naming(descriptor):
                    written = os.pwrite(descriptor, data, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or descriptor in self._buffered:
                    raise
                self._leave_direct(descriptor)  # a device with larger blocks, or a file system that refuses this late
                continue
            data, offset = data[written:], offset + written
            if data and written % ALIGN_BYTES and descriptor not in self._buffered:
                self._leave_direct(descriptor)  # a short write: what is left is no longer aligned

    def finish(self, descriptor: int, size: int) -> None:
        try:
            with self._naming(descriptor):
                os.ftruncate(descriptor, size)
                if self._created:
                    os.fchmod(descriptor, 0o444)
                os.fsync(descriptor)
        finally:
            self.abandon(descriptor)

    def abandon(self, descriptor: int) -> None:
        self._buffered.discard(descriptor)
        self._paths.pop(descriptor, None)
        os.close(descriptor)

    def link(self, source: str, target: str) -> None:
        os.link(source, target)

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)  # noqa: PTH104

    def exchange(self, one: str, other: str) -> None:
        _exchange(one, other)

    def remove_file(self, path: str) -> None:
        os.unlink(path)  # noqa: PTH108

    def remove_directory(self, path: str) -> None:
        os.rmdir(path)  # noqa: PTH106

    def sync_directory(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            error.filename = path
            raise
        finally:
            os.close(descriptor)

    @contextmanager
    def _naming(self, descriptor: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = self._paths.get(descriptor)
            raise

    def _leave_direct(self, descriptor: int) -> None:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
        self._buffered.add(descriptor)


class ExistingFile(LocalStore):
    """Writes over a file that is there already, such as one whose lock tells that its writer lives; keeps its mode."""

    _created = 0


def _reserve(descriptor: int, size: int) -> None:
    """Find out now, not in the middle of writing, whether there is room; extents are also less scattered."""
    rounded = -(-size // ALIGN_BYTES) * ALIGN_BYTES
    try:
        os.posix_fallocate(descriptor, 0, rounded)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def _exchange(one: str, other: str) -> None:
    """``renameat2(…, RENAME_EXCHANGE)``, which the standard library does not offer."""
    try:
        rename = _libc.renameat2
    except AttributeError:
        raise OSError(errno.ENOTSUP, "renameat2 is not offered", other) from None
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        number = errno.ENOTSUP if number in (errno.EINVAL, errno.ENOSYS) else number
        raise OSError(number, os.strerror(number), other)


_libc = ctypes.CDLL(None, use_errno=True)
