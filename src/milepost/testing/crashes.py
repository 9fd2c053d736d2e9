"""Every state that a power cut may leave, from a recording of the calls that were made before it.

What is durable at a moment is what was synced: a file's bytes by an fsync of the file, the names in a directory by one
of the directory. Of everything else, the *pending* operations, a crash keeps some and loses others:

- in the plain case the first so many are kept, in their order, and the rest is lost (a *cut*);
- a *reordering* is one operation that breaks this order: an earlier one that is lost, a later one that is kept, or a
  write of which only the first half arrives; the rest of its place is zeros, as reserved space is.

Operations on one name keep their order among themselves, as in every file system with a journal; a rename or an
exchange, which concerns two names, happens whole or not at all. Nothing else is assumed: an fsync of a file does not
bring its name with it, nor does an fsync of a directory bring that directory's own. ext4, XFS and btrfs promise more.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.testing.recording import ROOT, Data, Entries, Inode, Mark, Operation, Picture, RecordingStore, Sync

_TORN = "torn"
_KEPT = "kept"
Fates = Mapping[int, str]
"""By number of a pending operation: kept or torn. One that is not in here is lost."""


@dataclass(frozen=True)
class CrashState:
    """A directory as a crash may leave it.

    Attributes:
        after: how many operations had been issued.
        marks: the marks that had been set by then, oldest first.
        told: what became of the operations that were pending, for the message of a test that fails.
    """

    after: int
    marks: tuple[str, ...]
    told: tuple[str, ...]
    _picture: Picture

    def write_to(self, directory: Path) -> None:
        """Lay the state out in `directory`, which is made."""
        made: dict[Inode, Path] = {}
        todo = [(directory, ROOT)]
        while todo:
            path, inode = todo.pop()
            path.mkdir()
            for name, number in self._picture.directories[inode].items():
                if number in self._picture.directories:
                    todo.append((path / name, number))
                elif number in made:
                    (path / name).hardlink_to(made[number])
                else:
                    (path / name).write_bytes(self._picture.files[number])
                    (path / name).chmod(0o444)
                    made[number] = path / name

    def __str__(self) -> str:
        return f"after {self.after} operations: " + "; ".join(self.told)


def crash_states(
    recording: RecordingStore, *, reorderings: int = 2, samples: int = 0, seed: int = 0
) -> Iterator[CrashState]:
    """The states that a crash may leave after each prefix of a recording, each state once.

    Args:
        reorderings: all states with up to so many are given.
        samples: for each prefix, so many states with any number of reorderings beside those, drawn at random.
        seed: of the draw.
    """
    seen: set[Any] = set()
    draw = random.Random(seed)
    for after in range(len(recording.log) + 1):
        issued = recording.log[:after]
        pending = pending_operations(issued)
        marks = tuple(operation.name for operation in issued if isinstance(operation, Mark))
        for effective in _choices(issued, pending, reorderings, samples, draw):
            picture = _played(recording.initial, issued, set(pending), effective)
            key = (marks, _canonical(picture))
            if key not in seen:
                seen.add(key)
                yield CrashState(after, marks, _told(issued, pending, effective), picture)


def pending_operations(issued: Sequence[Operation]) -> list[int]:
    """Numbers of the operations that nothing has made durable."""
    pending: list[int] = []
    for number, operation in enumerate(issued):
        if isinstance(operation, Sync):
            pending = [n for n in pending if _inode(issued[n]) != operation.inode]
        elif not isinstance(operation, Mark):
            pending.append(number)
    return pending


def _inode(operation: Operation) -> Inode | None:
    return operation.directory if isinstance(operation, Entries) else getattr(operation, "file", None)


def _choices(
    issued: Sequence[Operation], pending: list[int], reorderings: int, samples: int, draw: random.Random
) -> Iterator[Fates]:
    given: set[frozenset[tuple[int, str]]] = set()
    for fates in itertools.chain(_near(issued, pending, reorderings), _drawn(issued, pending, samples, draw)):
        effective = _in_order(issued, pending, fates)
        key = frozenset(effective.items())
        if key not in given:
            given.add(key)
            yield effective


def _near(issued: Sequence[Operation], pending: list[int], reorderings: int) -> Iterator[Fates]:
    for cut in range(len(pending) + 1):
        plain = dict.fromkeys(pending[:cut], _KEPT)
        for count in range(min(reorderings, len(pending)) + 1):
            for numbers in itertools.combinations(pending, count):
                for others in itertools.product(*[_other_fates(issued[n], n in plain) for n in numbers]):
                    fates: dict[int, str] = dict(plain)
                    for number, fate in zip(numbers, others, strict=True):
                        if fate is None:
                            del fates[number]
                        else:
                            fates[number] = fate
                    yield fates


def _other_fates(operation: Operation, kept: bool) -> list[str | None]:
    torn: list[str | None] = [_TORN] if isinstance(operation, Data) and operation.data else []
    return [None if kept else _KEPT, *torn]


def _drawn(issued: Sequence[Operation], pending: list[int], samples: int, draw: random.Random) -> Iterator[Fates]:
    for _ in range(samples if pending else 0):
        share = draw.random()
        fates = {n: _KEPT for n in pending if draw.random() < share}
        for number in fates:
            if isinstance(issued[number], Data) and draw.random() < 0.2:
                fates[number] = _TORN
        yield fates


def _in_order(issued: Sequence[Operation], pending: list[int], fates: Fates) -> Fates:
    """The fates, where what comes after a lost operation on the same name is lost as well."""
    lost: set[object] = set()
    effective = {}
    for number in pending:
        operation = issued[number]
        if not isinstance(operation, Entries):
            if number in fates:
                effective[number] = fates[number]
            continue
        touched = {(operation.directory, name) for name, _ in operation.names}
        if number not in fates or touched & lost:
            lost |= touched
        else:
            effective[number] = fates[number]
    return effective


def _played(initial: Picture, issued: Sequence[Operation], pending: set[int], fates: Fates) -> Picture:
    picture = initial.copy()
    for number, operation in enumerate(issued):
        fate = fates.get(number) if number in pending else _KEPT
        if isinstance(operation, Entries):
            _play_entries(picture, operation, fate)
        elif isinstance(operation, Data):
            before = picture.files.setdefault(operation.file, b"")
            if fate is not None:
                picture.files[operation.file] = _changed(before, operation, torn=fate == _TORN)
    return picture


def _play_entries(picture: Picture, operation: Entries, fate: str | None) -> None:
    for _, inode in operation.names:  # a file that has a name has bytes, a directory has names, however few
        if inode is not None and inode not in picture.files and inode not in picture.directories:
            if operation.told.startswith("mkdir"):
                picture.directories[inode] = {}
            else:
                picture.files[inode] = b""
    if fate is None:
        return
    for name, inode in operation.names:
        if inode is None:
            picture.directories[operation.directory].pop(name, None)
        else:
            picture.directories[operation.directory][name] = inode


def _changed(before: bytes, operation: Data, *, torn: bool) -> bytes:
    if operation.data is None:
        return before[: operation.offset].ljust(operation.offset, b"\0")
    data, start, stop = operation.data, operation.offset, operation.offset + len(operation.data)
    arrived = data[: len(data) // 2].ljust(len(data), b"\0") if torn else data
    return before[:start].ljust(start, b"\0") + arrived + before[stop:]


def _canonical(picture: Picture, inode: Inode = ROOT) -> Any:
    names = picture.directories[inode]
    return tuple(
        (name, _canonical(picture, found) if found in picture.directories else (found, picture.files[found]))
        for name, found in sorted(names.items())
    )


def _told(issued: Sequence[Operation], pending: list[int], fates: Fates) -> tuple[str, ...]:
    return tuple(f"{fates.get(n, 'lost')}: {getattr(issued[n], 'told', '')}" for n in pending)
