"""Local files: replaced atomically and durably, linked, removed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from milepost.errors import CheckpointSaveError

_PENDING = ".pending"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()  # read once: asking sets it for a moment, which another thread could see


@contextmanager
def replacing(path: str | os.PathLike[str], *, step: int | None = None) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`; on success it is fsynced, renamed over `path`, and the directory fsynced.

    The temporary file lies in the destination's directory, so that the rename is atomic and $TMPDIR stays untouched.

    Raises:
        CheckpointSaveError: any step failed. The temporary file is gone and what was at `path` is intact.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        temporary, file = _pending(path)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_UMASK)
            temporary.replace(path)  # before the lock is given up with the file: else a sweep could take it for stale
        sync_directory(path.parent)
    except Exception as error:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        cause = f"{type(error).__name__}: {error}"
        raise CheckpointSaveError(
            f"Saving the checkpoint of step {step} to {str(path)!r} failed: {cause}. What was there before is intact;"
            " free space or fix the permissions of the directory, or give another dirpath.",
            path=str(path),
            step=step,
        ) from error
    except BaseException:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        raise


def _pending(path: Path) -> tuple[Path, IO[bytes]]:
    """A new temporary file beside `path`, locked, which tells it from what a killed process left behind."""
    while True:
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PENDING, dir=path.parent)
        file = os.fdopen(number, "w+b")
        with suppress(OSError):  # a file system without locks: nothing is swept there either
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.lexists(name):
            return Path(name), file
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
    temporary = target.with_name(f".{target.name}.{os.getpid()}.link")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            temporary.unlink()
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
    """Delete the file and make that durable; where there is none, do nothing."""
    path = Path(path)
    with suppress(FileNotFoundError):
        path.unlink()
        sync_directory(path.parent)
