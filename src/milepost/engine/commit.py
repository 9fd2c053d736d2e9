"""The commit of a checkpoint directory: all or nothing, through every crash. The sequence is in docs/format.md."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Callable
from contextlib import suppress

from milepost.format.manifest import HEAD_NAME
from milepost.storage.store import Store

PENDING = ".pending-"
REMOVED = ".removed-"
REPLACED = ".replaced-"
_UNLOCKED_AGE_SECONDS = 24 * 3600.0
"""Where the file system has no locks, leftovers are removed only when they are this old."""
_ATTEMPTS = 100
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


def make_parents(store: Store, path: str) -> None:
    """Make a directory and those above it that are missing, each durable before the next.

    The name of the deepest one that was there is made durable too: a process that was killed may have made it.
    """
    missing = []
    while not os.path.isdir(path):  # noqa: PTH112
        missing.append(path)
        path = os.path.dirname(path)  # noqa: PTH120
    try:
        store.sync_directory(os.path.dirname(path))  # noqa: PTH120
    except OSError as error:
        if error.errno != errno.EACCES:  # it is somebody else's, who keeps it
            raise
    for directory in reversed(missing):
        with suppress(FileExistsError):  # another process came first; that it is a directory, the next call finds
            store.make_directory(directory)
        store.sync_directory(os.path.dirname(directory))  # noqa: PTH120


class PendingDirectory:
    """A directory that is being written beside the place it is meant for. Its lock tells that its writer lives."""

    def __init__(self, store: Store, target: str) -> None:
        self._store = store
        self.target = target
        self._parent, self._name = os.path.split(target)
        self._aside = f"{self._parent}/{REPLACED}{self._name}"
        self._undone = False  # a rename was made and taken back
        self._placed = False  # what was written lies at the target
        self.path, self._lock = self._make()

    def _make(self) -> tuple[str, int]:
        while True:
            path = f"{self._parent}/{PENDING}{self._name}-{os.getpid()}-{secrets.token_hex(4)}"
            self._store.make_directory(path)
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
            OSError: it is not committed; what was at the target before is still there, whole. If the parent cannot be
                made durable, and the file system refuses to take the rename back, the new one stands there, whole.
        """
        self._store.sync_directory(self.path)
        for _ in range(_ATTEMPTS):  # another saver or a removal may come between looking and renaming
            if self._moved() or self._exchanged():
                self._release()
                return
        raise OSError(errno.EEXIST, "others replace it all the time", self.target)

    def _moved(self) -> bool:
        """Take the place if it is free."""
        if os.path.lexists(self.target):
            return False
        try:
            self._place(lambda: self._store.rename(self.path, self.target))
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            raise
        self._make_durable(lambda: self._store.rename(self.target, self.path))
        return True

    def _exchanged(self) -> bool:
        """Change places with what is there, and remove that."""
        store = self._store
        try:
            self._place(lambda: store.exchange(self.path, self.target))  # the pending name then holds the old one
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            return self._moved_aside()
        self._make_durable(lambda: store.exchange(self.path, self.target))
        with suppress(OSError):  # it is committed: what is left of the old one is swept later
            remove_tree(store, self.path)
        return True

    def _moved_aside(self) -> bool:
        """Where two directories cannot be swapped in one step: readers know to look for the name given here."""
        store = self._store
        if os.path.lexists(self._aside):  # left by a killed process, whose renames may not be durable yet
            store.sync_directory(self._parent)
            _remove_aside(store, self._aside)
        try:
            store.rename(self.target, self._aside)
        except FileNotFoundError:
            return False
        try:
            self._place(lambda: store.rename(self.path, self.target))
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            with suppress(OSError):
                store.rename(self._aside, self.target)
            raise
        self._make_durable(self._put_back)
        with suppress(OSError):
            _remove_aside(store, self._aside)
        return True

    def _put_back(self) -> None:
        self._store.rename(self.target, self.path)
        self._store.rename(self._aside, self.target)

    def _place(self, rename: Callable[[], None]) -> None:
        self._placed = True  # before it is: an interrupt may come between the two
        try:
            rename()
        except OSError:
            self._placed = False
            raise

    def _make_durable(self, undo: Callable[[], None]) -> None:
        """Acknowledge the new names; where that fails, take them back: the save has failed, so nothing has changed."""
        try:
            self._store.sync_directory(self._parent)
        except OSError:
            with suppress(OSError):
                undo()
                self._placed, self._undone = False, True
            raise

    def abandon(self) -> None:
        """Remove what was written. Never raises: an error is under way already."""
        try:
            if not self._placed:  # else the pending name holds, if anything, what was there before
                with suppress(OSError):
                    if self._undone:  # or a crash could leave the rename, without what takes it back, and no files
                        self._store.sync_directory(self._parent)
                    remove_tree(self._store, self.path)
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_checkpoint(store: Store, path: str) -> None:
    """Remove a checkpoint directory. It stops being one in a single step; where there is none, nothing happens."""
    parent, name = os.path.split(path)
    for found in (f"{parent}/{REPLACED}{name}", path):  # the one it replaced first, which would else be put back
        gone = f"{parent}/{REMOVED}{name}-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            store.rename(found, gone)
        except FileNotFoundError:
            continue
        store.sync_directory(parent)
        remove_tree(store, gone)


def _remove_aside(store: Store, path: str) -> None:
    """For good: were the checkpoint that replaced it removed later, and that alone durable, it would be put back."""
    remove_tree(store, path)
    store.sync_directory(os.path.dirname(path))  # noqa: PTH120


def remove_tree(store: Store, path: str) -> None:
    """Remove a directory of files, its head first: a half-removed one is no checkpoint. Links are not followed.

    What somebody else removes at the same time is not missed.
    """
    with suppress(FileNotFoundError):
        if not _is_directory(path):
            store.remove_file(path)
            return
        for name in sorted(os.listdir(path), key=lambda name: name != HEAD_NAME):  # noqa: PTH208
            remove_tree(store, f"{path}/{name}")
        store.remove_directory(path)


def sweep(store: Store, directory: str) -> list[str]:
    """Remove what killed processes left in `directory`, put back what one was replacing; return what was removed."""
    try:
        names = sorted(os.listdir(directory))  # noqa: PTH208
    except OSError:
        return []
    swept: list[str] = []
    alive: set[str] = set()
    for name in names:
        path = f"{directory}/{name}"
        with suppress(OSError):
            if name.startswith(REPLACED):
                replaced = name.removeprefix(REPLACED)
                if os.path.lexists(f"{directory}/{replaced}"):
                    _swept(store, path, swept)
                elif replaced not in alive:  # else its saver is between its two renames
                    store.rename(path, f"{directory}/{replaced}")
                    store.sync_directory(directory)
            elif name.startswith((PENDING, REMOVED)) and not _swept(store, path, swept):
                alive.add(name.removeprefix(PENDING).rsplit("-", 2)[0])
    return swept


def _swept(store: Store, path: str, swept: list[str]) -> bool:
    """Remove one directory that nobody holds."""
    lock = None
    if _is_directory(path) and (lock := _locked(path, wait=False)) is None:
        return False
    try:
        if not swept:
            # What a killed process renamed may not be durable: a power cut would then bring the old names back, of
            # which one is the checkpoint that is removed here.
            store.sync_directory(os.path.dirname(path))  # noqa: PTH120
        (_remove_aside if os.path.basename(path).startswith(REPLACED) else remove_tree)(store, path)  # noqa: PTH119
        swept.append(path)
    finally:
        if lock is not None:
            os.close(lock)
    return True


def _locked(path: str, *, wait: bool) -> int | None:
    """A descriptor of the directory with its lock held. None: another process holds it, or it is gone.

    Where there are no locks at all: the descriptor for its writer; for a sweeper only if nothing has changed for long.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if wait and not isinstance(error, FileNotFoundError):
            raise
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


Identity = tuple[int, int, int, int]
"""Tells a file from one that has its name, or later its inode: device, inode, size, time of the last write."""


def identity(path: str, directory: int | None = None) -> Identity:
    """The identity of the file at `path`, which is not followed if it is a link."""
    status = os.stat(path, dir_fd=directory, follow_symlinks=False)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _is_directory(path: str) -> bool:
    """Whether it is one itself, not a link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _still(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))  # noqa: PTH116
    except FileNotFoundError:
        return False
