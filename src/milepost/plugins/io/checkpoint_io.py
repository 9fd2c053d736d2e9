"""How a checkpoint is stored: the class to derive from, and the calls that take any object with its three methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from milepost.plugins.io import parts, raw
from milepost.plugins.io.raw import Completed, Pending, copies_later, save, wait
from milepost.plugins.io.zero import whole

__all__ = [
    "CheckpointIO",
    "Completed",
    "Pending",
    "copies_later",
    "save",
    "wait",
]  # and the calls below, by the module's name
_METHODS = ("save_checkpoint", "load_checkpoint", "remove_checkpoint")


class CheckpointIO(ABC):
    """Derive from this to decide how and where checkpoints are stored; hooks decide what is in them.

    Three methods are needed. Beyond them a plugin may offer, each on its own: ``exists(path) -> bool``,
    ``list(directory) -> list[str]``, ``verify(path)`` (raises when the stored bytes are damaged),
    ``link(source, target)`` (a second name for a checkpoint, without writing it again), ``check(checkpoint)`` (raises
    when it could not be stored as data; called before the first step), ``probe(directory)`` (the bytes free there;
    raises where nothing can be written), ``wait()``, and a `save_checkpoint` that returns a handle with ``done()`` and
    ``result()`` because it writes in the background.

    A plugin that copies after `save_checkpoint` has returned takes the keyword ``optimizers``: parameters and state of
    these change in their ``step`` only, until ``staged()``, which the plugin then has too, is called: it waits for the
    copy. The Trainer calls it before anything of its own, or a hook of the user's, may write to weights.

    Attributes:
        every_rank: where several ranks train, whether `save_checkpoint` is called on each of them, with what that rank
            has: DTensors as they are, `milepost.PerRank` values unopened. Else rank 0 alone is called, with all of it.
    """

    every_rank: ClassVar[bool] = False

    @abstractmethod
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> Any:
        """Store `checkpoint` under `path`. When this returns None the checkpoint is durable; raise where it is not."""

    @abstractmethod
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return what `save_checkpoint` was given. ``load_checkpoint(self, path, storage_options=None)`` works too."""

    @abstractmethod
    def remove_checkpoint(self, path: Any) -> None:
        """Delete the checkpoint; where there is none, do nothing."""

    def teardown(self) -> None:
        """Called at the end of every run: finish what is under way, raise what failed. Another run may follow."""
        return None


def refuse_storage_options(io: Any, storage_options: Any) -> None:
    """For a plugin that writes local files. Raises TypeError where options were given, also empty ones."""
    if storage_options is not None:
        raise TypeError(
            f"storage_options={storage_options!r} is not supported for `{type(io).__name__}`: it writes local files."
            " Pass a CheckpointIO of your own to Trainer(plugins=...) for other storage."
        )


def is_checkpoint_io(value: Any) -> bool:
    """Whether `value` has the three methods, whatever class it derives from."""
    return not isinstance(value, type) and all(callable(getattr(value, name, None)) for name in _METHODS)


def staged(io: Any) -> None:
    """Wait until what is being saved is copied, so that weights may be written to."""
    if (offered := raw.offered(io, "staged")) is not None:
        offered()


def load(
    io: Any, path: Any, map_location: Any = None, weights_only: bool | None = None, mapped: bool | None = None
) -> dict[str, Any]:
    """Load through `io`; `map_location`, `weights_only` and `mapped` go by name and only to plugins that take them.

    Raises:
        CheckpointFormatError: the plugin returned something that is no dict, such as None.
    """
    if parts.is_there(io, path):
        return whole(io, path, weights_only)
    return raw.load(io, path, map_location, weights_only, mapped)


def remove(io: Any, path: Any) -> None:
    if parts.is_there(io, path):
        parts.remove(io, path)
    else:
        io.remove_checkpoint(path)


def exists(io: Any, path: Any) -> bool | None:
    """Whether there is a checkpoint at `path`; None where the plugin cannot tell and no file of that name is there."""
    if parts.is_there(io, path):
        return True
    offered = raw.offered(io, "exists")
    answer = None if offered is None else offered(path)
    if answer is not None:
        return bool(answer)
    return True if Path(str(path)).exists() else None


def list_checkpoints(io: Any, directory: Any) -> list[str] | None:
    """Paths of the checkpoints in `directory`; None where the plugin does not offer it, or wraps one that does not."""
    offered = raw.offered(io, "list")
    listed = None if offered is None else offered(directory)
    return None if listed is None else list(dict.fromkeys([*map(str, listed), *parts.list_in(io, directory)]))


def verify(io: Any, path: Any) -> str | None:
    """Check the stored bytes. Returns ``"cannot"`` where the plugin does not offer it, None when they are good.

    Raises:
        CheckpointCorruptError, CheckpointNotFoundError, or what the plugin raises: they are not.
    """
    if parts.is_there(io, path):
        return parts.verify(io, path)
    offered = raw.offered(io, "verify")
    if offered is None:
        return "cannot"
    return "cannot" if offered(path) == "cannot" else None


def link(io: Any, source: Any, target: Any) -> bool:
    """Give the checkpoint at `source` the second name `target`. False: not offered or not possible, save it again."""
    if parts.is_there(io, source):
        return parts.link(io, source, target)
    offered = raw.offered(io, "link")
    return False if offered is None else offered(source, target) is not False


def takes_every_rank(io: Any) -> bool:
    """Whether `io`, or what it wraps, is to be called on every rank, and puts together what they have by itself."""
    inner = getattr(io, "checkpoint_io", None)
    return bool(getattr(io, "every_rank", False)) or (inner is not None and takes_every_rank(inner))


def offers(io: Any, capability: str) -> bool:
    """Whether `io` has the optional method `capability`."""
    return raw.offered(io, capability) is not None


def check(io: Any, checkpoint: dict[str, Any]) -> None:
    """Ask whether `checkpoint` could be stored, without storing it. Nothing happens where it is not offered.

    Raises:
        UnencodableValueError, or what the plugin raises: a value in it cannot be stored as it should be.
    """
    if (offered := raw.offered(io, "check")) is not None:
        offered(checkpoint)


def probe(io: Any, directory: Any) -> int | None:
    """Free bytes where checkpoints of `directory` go; None where the plugin does not offer it.

    Raises:
        OSError: nothing can be written there.
    """
    offered = raw.offered(io, "probe")
    return None if offered is None else offered(directory)


def teardown(io: Any) -> None:
    if (offered := raw.offered(io, "teardown")) is not None:
        offered()
