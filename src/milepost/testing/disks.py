"""Disks that fill up, break and lose their power: what the suite of stores is run against. Real ones, no imitations."""

from __future__ import annotations

import fcntl
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN: _IOR('X', 125, __u32)
_WITHOUT_THE_LOG = (2).to_bytes(4, sys.byteorder)


class Disk:
    """A small ext4 in a file, whose power can be cut. Making one needs root.

    Raises:
        OSError: it cannot be made or mounted here.
    """

    def __init__(self, place: Path, size: int = 96 << 20) -> None:
        self.image, self.mounted = place / "disk.img", place / "mounted"
        self.mounted.mkdir()
        with self.image.open("wb") as file:
            file.truncate(size)
        _run("mkfs.ext4", "-q", "-F", str(self.image))
        self.mount()

    def mount(self) -> None:
        _run("mount", "-o", "loop", str(self.image), str(self.mounted))

    def unmount(self) -> None:
        _run("umount", str(self.mounted))

    def close(self) -> None:
        """Unmount it for good, also where a file was left open."""
        _run("umount", "-l", str(self.mounted))

    def cut(self) -> None:
        """The power goes: nothing that is not on the disk now gets there, what is in the journal's memory neither."""
        descriptor = os.open(self.mounted, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, _WITHOUT_THE_LOG)
        finally:
            os.close(descriptor)

    def cut_and_mounted_again(self) -> None:
        """What a machine finds that is switched on again."""
        self.cut()
        self.unmount()
        self.mount()


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """A file system in memory with room for `size` bytes.

    Raises:
        OSError: it cannot be mounted here; that needs root.
    """
    place.mkdir()
    _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
    try:
        yield place
    finally:
        _run("umount", "-l", str(place))  # also where the store under test has left a file open


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: a write that would is cut short there, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores the signal: EFBIG is left
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@dataclass(frozen=True)
class Synced:
    """One fsync: of which inode, how large and how writable that was at the moment."""

    inode: tuple[int, int]
    size: int
    writable: bool


class Syncs:
    """The calls of ``os.fsync`` and ``os.fdatasync`` while it is installed; they fail with `error` where one is given.

    Args:
        patch: sets an attribute of a module for as long as it is to last, as pytest's ``monkeypatch.setattr`` does.
    """

    def __init__(self, patch: Callable[[object, str, object], None]) -> None:
        self.seen: list[Synced] = []
        self.error: int | None = None
        for name in ("fsync", "fdatasync"):
            patch(os, name, self._watched(getattr(os, name)))

    def of(self, path: Path) -> list[Synced]:
        found = path.stat()
        return [synced for synced in self.seen if synced.inode == (found.st_dev, found.st_ino)]

    def _watched(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def sync(descriptor: int) -> None:
            found = os.stat(descriptor)
            writable = bool(stat.S_IMODE(found.st_mode) & 0o222)
            self.seen.append(Synced((found.st_dev, found.st_ino), found.st_size, writable))
            if self.error is not None:
                raise OSError(self.error, os.strerror(self.error))
            real(descriptor)

        return sync


def open_files() -> list[str]:
    """What this process holds open."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(entry.readlink()))
        except FileNotFoundError:  # the listing itself
            continue
    return sorted(found)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise OSError(f"there is no {command[0]}") from error
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
