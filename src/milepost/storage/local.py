"""Local files: replaced atomically and durably, linked, removed."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from milepost.errors import CheckpointRemoveError, CheckpointSaveError

_PENDING = ".pending"
_NAME_BYTES = 200  # of the destination's name in that of its temporary file: file systems allow 255 in all


@contextmanager
def replacing(path: str | os.PathLike[str], *, step: int | None = None) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`; on success it is fsynced, renamed over `path`, and the directory fsynced.

    The temporary file lies in the destination's directory, so that the rename is atomic and $TMPDIR stays untouched.
    Directories that are missing are made, durably too.

    Raises:
        CheckpointSaveError: any step failed. The temporary file is gone and what was at `path` is intact; if only the
            last step failed, the new file is there, and the message says that it may not outlive a power cut.
    """
    path = Path(path)
    temporary: Path | None = None
    in_place = False
    try:
        _make_directory(path.parent)
        sweep(path.parent)
        temporary, file = _pending(path)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)  # before the lock is given up with the file: else a sweep could take it for stale
            in_place = True
        sync_directory(path.parent)
    except BaseException as error:
        if temporary is not None and not in_place:
            with suppress(OSError):
                temporary.unlink()
        if not isinstance(error, Exception):
            raise
        what_is_there = (
            "The new file is in its place, but its directory could not be made durable: a power cut may undo it."
            if in_place
            else "What was there before is intact; free space or fix the permissions of the directory, or give another"
            " dirpath."
        )
        raise CheckpointSaveError(
            f"Saving the checkpoint of step {step} to {str(path)!r} failed: {type(error).__name__}: {error}."
            f" {what_is_there}",
            path=str(path),
            step=step,
        ) from error


def _make_directory(directory: Path) -> None:
    """Make it and its missing parents; what was made is an entry of its parent, which must outlive a power cut too."""
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        sync_directory(place.parent)


def _temporary_name(path: Path) -> Path:
    name = path.name.encode()[:_NAME_BYTES].decode(errors="ignore")
    return path.with_name(f".{name}.{secrets.token_hex(8)}{_PENDING}")


def _pending(path: Path) -> tuple[Path, IO[bytes]]:
    """A new temporary file beside `path`, locked, which tells it from what a killed process left behind."""
    while True:
        name = _temporary_name(path)
        file = os.fdopen(os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "w+b")
        with suppress(OSError):  # a file system without locks: nothing is swept there either
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.lexists(name):
            return name, file
        file.close()  # somebody's sweep came between its making and its lock


def sweep(directory: Path) -> None:
    """Remove temporary files that no living process holds: a save that was killed left them."""
    for stale in directory.glob(f".*{_PENDING}"):
        with suppress(OSError), stale.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stale.unlink()


def sync_directory(directory: Path) -> None:
    """Make the directory's entries durable."""
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def probe(directory: str | os.PathLike[str]) -> int:
    """Write, fsync and remove a small file in `directory`, or in the nearest parent where it is not there yet.

    Returns:
        The bytes that this user may still write there.

    Raises:
        OSError: nothing can be written.
    """
    path = Path(directory).absolute()
    place = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    with tempfile.TemporaryFile(dir=place) as file:  # without a name: nobody sees it, nothing is left
        file.write(bytes(4096))
        file.flush()
        os.fsync(file.fileno())
    return shutil.disk_usage(place).free


def link(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> bool:
    """Give `source` the second name `target`, replacing what is there atomically. False where that cannot be had."""
    source, target = Path(source), Path(target)
    temporary = _temporary_name(target)
    try:
        _make_directory(target.parent)
        with source.open("rb") as held:
            with suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_SH)  # the temporary name is the same file: no sweep takes it
            os.link(source, temporary)
            temporary.replace(target)
            with suppress(FileNotFoundError):
                temporary.unlink()  # rename does nothing when both names are already one file
        sync_directory(target.parent)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        return False
    return True


def remove(path: str | os.PathLike[str]) -> None:
    """Delete the file and make that durable; where there is none, do nothing.

    Raises:
        CheckpointRemoveError: it is still there, or may be again after a power cut.
    """
    path = Path(path)
    try:
        with suppress(FileNotFoundError):
            path.unlink()
            sync_directory(path.parent)
    except OSError as error:
        raise CheckpointRemoveError(
            f"Removing the checkpoint {str(path)!r} failed: {type(error).__name__}: {error}. Give yourself the right to"
            " write in its directory, and remove it again.",
            path=str(path),
        ) from error
