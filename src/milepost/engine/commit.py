"""The commit of a checkpoint directory: all or nothing, through every crash. The sequence is in docs/format.md."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

from milepost.format.manifest import HEAD_NAME
from milepost.storage.files import Files

PENDING = ".pending-"
REMOVED = ".removed-"
REPLACED = ".replaced-"
_UNLOCKED_AGE_SECONDS = 24 * 3600.0
"""Where the file system has no locks, leftovers are removed only when they are this old."""


class PendingDirectory:
    """A directory that is being written beside the place it is meant for. Its lock tells that its writer lives."""

    def __init__(self, files: Files, target: str) -> None:
        self._files = files
        self.target = target
        self._parent, self._name = os.path.split(target)
        self.path, self._lock = self._make()

    def _make(self) -> tuple[str, int]:
        while True:
            path = f"{self._parent}/{PENDING}{self._name}-{os.getpid()}-{secrets.token_hex(4)}"
            self._files.make_directory(path)
            lock = _locked(path, wait=True)
            if lock is not None and _still(path, lock):
                return path, lock
            if lock is not None:  # a sweeper came between the two: it holds nothing of ours yet
                os.close(lock)

    def file(self, name: str) -> str:
        return f"{self.path}/{name}"

    def commit(self) -> None:
        """Make it the checkpoint at the target. All its files are durable already.

        Raises:
            OSError: it is not committed; what was at the target before is still there, whole.
        """
        files = self._files
        files.sync_directory(self.path)
        if not os.path.lexists(self.target):
            files.rename(self.path, self.target)
            files.sync_directory(self._parent)
            self._release()
            return
        try:
            files.exchange(self.path, self.target)  # now the pending name holds what was there before
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            self._move_aside()
            return
        files.sync_directory(self._parent)
        with suppress(OSError):  # it is committed: what is left of the old one is swept later
            remove_tree(files, self.path)
        self._release()

    def _move_aside(self) -> None:
        """Where two directories cannot be swapped in one step: readers know to look for the name given here."""
        files = self._files
        aside = f"{self._parent}/{REPLACED}{self._name}"
        if os.path.lexists(aside):
            remove_tree(files, aside)
        files.rename(self.target, aside)
        files.rename(self.path, self.target)
        files.sync_directory(self._parent)
        with suppress(OSError):
            remove_tree(files, aside)
        self._release()

    def abandon(self) -> None:
        """Remove what was written. Never raises: an error is under way already."""
        with suppress(OSError):
            remove_tree(self._files, self.path)
        self._release()

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_checkpoint(files: Files, path: str) -> None:
    """Remove a checkpoint directory. It stops being one in a single step; where there is none, nothing happens."""
    parent, name = os.path.split(path)
    gone = f"{parent}/{REMOVED}{name}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        files.rename(path, gone)
    except FileNotFoundError:
        return
    files.sync_directory(parent)
    remove_tree(files, gone)


def remove_tree(files: Files, path: str) -> None:
    """Remove a directory of files, its head first: a half-removed one is no checkpoint. Links are not followed."""
    names = sorted(os.listdir(path), key=lambda name: name != HEAD_NAME)  # noqa: PTH208
    for name in names:
        with suppress(FileNotFoundError):
            entry = Path(path) / name
            if entry.is_dir() and not entry.is_symlink():
                remove_tree(files, str(entry))
            else:
                files.remove_file(str(entry))
    files.remove_directory(path)


def sweep(files: Files, directory: str) -> list[str]:
    """Remove what killed processes left in `directory`, put back what one was replacing; return what was removed."""
    swept = []
    with suppress(FileNotFoundError):
        for entry in sorted(os.scandir(directory), key=lambda found: found.name):
            if entry.name.startswith(REPLACED):
                target = f"{directory}/{entry.name.removeprefix(REPLACED)}"
                if not os.path.lexists(target):
                    with suppress(OSError):
                        files.rename(entry.path, target)
                        files.sync_directory(directory)
                    continue
            elif not entry.name.startswith((PENDING, REMOVED)):
                continue
            if not entry.is_dir(follow_symlinks=False):
                continue
            lock = _locked(entry.path, wait=False)
            if lock is None:
                continue
            with suppress(OSError):
                remove_tree(files, entry.path)
                swept.append(entry.path)
            os.close(lock)
    return swept


def _locked(path: str, *, wait: bool) -> int | None:
    """A descriptor of the directory with its lock held. None: another process holds it, or it is gone.

    Where there are no locks at all: the descriptor for its writer; for a sweeper only if nothing has changed for long.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        if not wait and time.time() - os.fstat(descriptor).st_mtime < _UNLOCKED_AGE_SECONDS:
            os.close(descriptor)
            return None
    return descriptor


def _still(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))  # noqa: PTH116
    except FileNotFoundError:
        return False
