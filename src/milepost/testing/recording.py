"""A `Store` that writes down what is done through it: the input of the replay of crash states.

Every call becomes operations on *inodes*: files and directories apart from their names, as a file system keeps them.
A picture of the directory is taken when the recording begins; what is there then counts as durable.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

from milepost.storage.store import LocalStore, Store

Inode = int
ROOT: Inode = 0


@dataclass(frozen=True, slots=True)
class Entries:
    """Names in a directory that come, go or change hands, in one step. None: the name goes."""

    directory: Inode
    names: tuple[tuple[str, Inode | None], ...]
    told: str


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of a file that change: a write; or, with no `data`, its size becomes `offset`."""

    file: Inode
    offset: int
    data: bytes | None
    told: str


@dataclass(frozen=True, slots=True)
class Sync:
    """Everything done to this file or directory before is durable."""

    inode: Inode
    told: str


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that the test wants to know of: that a save has been acknowledged, say."""

    name: str


Operation = Entries | Data | Sync | Mark


@dataclass
class Picture:
    """A directory: for each directory inode its names, for each file inode its bytes."""

    directories: dict[Inode, dict[str, Inode]] = field(default_factory=lambda: {ROOT: {}})
    files: dict[Inode, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, root: str | os.PathLike[str]) -> Picture:
        """What lies in `root` now. Files with several names there are one inode."""
        picture = cls()
        seen: dict[tuple[int, int], Inode] = {}
        todo = [(Path(root), ROOT)]
        while todo:
            path, inode = todo.pop()
            for entry in sorted(path.iterdir()):
                status = entry.stat(follow_symlinks=False)
                number = seen.setdefault((status.st_dev, status.st_ino), len(seen) + 1)
                picture.directories[inode][entry.name] = number
                if entry.is_dir() and not entry.is_symlink():
                    picture.directories[number] = {}
                    todo.append((entry, number))
                elif number not in picture.files:
                    picture.files[number] = entry.read_bytes()
        return picture

    def copy(self) -> Picture:
        return Picture({d: dict(names) for d, names in self.directories.items()}, dict(self.files))


class RecordingStore:
    """Passes every call on to `store` and keeps it in `log`. Calls of several threads wait for each other.

    Args:
        root: the directory that is watched. All that is changed must lie in it.
        store: what makes the calls; the machine's own file system if it is not given.
    """

    def __init__(self, root: str | os.PathLike[str], store: Store | None = None) -> None:
        self._root = os.path.abspath(root)  # noqa: PTH100  # as the engine does: not resolved
        self._store = store or LocalStore()
        self._lock = threading.Lock()
        self._open: dict[int, Inode] = {}
        self.initial = Picture.of(self._root)
        self.log: list[Operation] = []
        self._live = {d: dict(names) for d, names in self.initial.directories.items()}
        self._next = max([ROOT, *self._live, *self.initial.files]) + 1

    def mark(self, name: str) -> None:
        """Note that something has happened, such as that a save has returned."""
        with self._lock:
            self.log.append(Mark(name))

    # ---- the calls ---------------------------------------------------------------------------------------------------

    def make_directory(self, path: str) -> None:
        with self._lock:
            self._store.make_directory(path)
            inode = self._new()
            self._live[inode] = {}
            self._enter(f"mkdir {self._short(path)}", {path: inode})

    def create(self, path: str, size: int) -> int:
        with self._lock:
            descriptor = self._store.create(path, size)
            inode = self._open[descriptor] = self._new()
            self._enter(f"create {self._short(path)}", {path: inode})
            if size:
                self.log.append(Data(inode, size, None, f"reserve {self._short(path)}"))
            return descriptor

    def write(self, descriptor: int, data: memoryview, offset: int) -> None:
        with self._lock:
            inode = self._open[descriptor]
            self.log.append(Data(inode, offset, bytes(data), f"write {len(data)} bytes at {offset} of {inode}"))
            self._store.write(descriptor, data, offset)

    def finish(self, descriptor: int, size: int) -> None:
        with self._lock:
            inode = self._open.pop(descriptor)
            self.log.append(Data(inode, size, None, f"truncate {inode} to {size}"))
            self._store.finish(descriptor, size)
            self.log.append(Sync(inode, f"fsync {inode}"))

    def abandon(self, descriptor: int) -> None:
        with self._lock:
            self._open.pop(descriptor)
            self._store.abandon(descriptor)

    def link(self, source: str, target: str) -> None:
        with self._lock:
            self._store.link(source, target)
            self._enter(f"link {self._short(source)} {self._short(target)}", {target: self._inode(source)})

    def rename(self, source: str, target: str) -> None:
        with self._lock:
            self._store.rename(source, target)
            told, inode = f"rename {self._short(source)} {self._short(target)}", self._inode(source)
            if Path(source).parent == Path(target).parent:
                self._enter(told, {source: None, target: inode})
            else:  # two directories, each of which becomes durable by itself
                self._enter(f"{told}: it comes", {target: inode})
                self._enter(f"{told}: it goes", {source: None})

    def exchange(self, one: str, other: str) -> None:
        with self._lock:
            self._store.exchange(one, other)
            swapped: dict[str, Inode | None] = {one: self._inode(other), other: self._inode(one)}
            self._enter(f"exchange {self._short(one)} {self._short(other)}", swapped)

    def remove_file(self, path: str) -> None:
        with self._lock:
            self._store.remove_file(path)
            self._enter(f"unlink {self._short(path)}", {path: None})

    def remove_directory(self, path: str) -> None:
        with self._lock:
            self._store.remove_directory(path)
            self._enter(f"rmdir {self._short(path)}", {path: None})

    def sync_directory(self, path: str) -> None:
        with self._lock:
            self._store.sync_directory(path)
            if self._short(path).startswith(os.pardir):  # what lies outside is taken to be durable
                return
            self.log.append(Sync(self._inode(path), f"fsync {self._short(path)}"))

    # ---- names and inodes --------------------------------------------------------------------------------------------

    def _new(self) -> Inode:
        self._next += 1
        return self._next - 1

    def _short(self, path: str) -> str:
        return os.path.relpath(path, self._root)

    def _inode(self, path: str) -> Inode:
        inode = ROOT
        for name in Path(self._short(path)).parts:
            inode = self._live[inode][name]
        return inode

    def _enter(self, told: str, names: dict[str, Inode | None]) -> None:
        """Log a change of names, all of which stand in one directory."""
        (parent,) = {str(Path(path).parent) for path in names}
        directory = self._inode(parent)
        changes = tuple((Path(path).name, inode) for path, inode in names.items())
        for name, inode in changes:
            if inode is None:
                self._live[directory].pop(name, None)
            else:
                self._live[directory][name] = inode
        self.log.append(Entries(directory, changes, told))
