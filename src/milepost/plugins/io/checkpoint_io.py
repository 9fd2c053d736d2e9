"""How a checkpoint is stored: the class to derive from, and the calls that take any object with its three methods."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from milepost.errors import CheckpointFormatError

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


class Pending(Protocol):
    """A save under way."""

    path: str

    def done(self) -> bool:
        """Whether the save has ended, well or badly. Never blocks."""

    def result(self, timeout: float | None = None) -> None:
        """Wait until the checkpoint is durable; raise what the save failed with, once."""


class Completed:
    """The handle of a save that was durable when it returned."""

    def __init__(self, path: str) -> None:
        self.path = path

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> None:
        return None


class _Handle:
    """A future of a plugin's own, with the path it was missing."""

    def __init__(self, future: Any, path: str) -> None:
        self.path = path
        self._future = future
        self._raised = False

    def done(self) -> bool:
        return bool(self._future.done())

    @property
    def failed(self) -> bool:
        return self._raised

    def result(self, timeout: float | None = None) -> None:
        if self._raised:
            return
        try:
            self._future.result(timeout)
        except TimeoutError:
            raise
        except BaseException:
            self._raised = True
            raise


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


def save(
    io: Any, checkpoint: dict[str, Any], path: Any, storage_options: Any = None, optimizers: Sequence[Any] = ()
) -> Pending:
    """Save through `io`. `storage_options` is passed on only when it was given, `optimizers` only to a taker."""
    options = {} if storage_options is None else {"storage_options": storage_options}
    if optimizers and copies_later(io):
        options["optimizers"] = optimizers
    returned = io.save_checkpoint(checkpoint, path, **options)
    if returned is None or not (hasattr(returned, "done") and hasattr(returned, "result")):
        return Completed(str(path))
    return returned if hasattr(returned, "path") else _Handle(returned, str(path))


def copies_later(io: Any) -> bool:
    """Whether `io` may copy after a save has returned: it takes ``optimizers``, by that name, and has ``staged``."""
    return _offered(io, "staged") is not None and "optimizers" in inspect.signature(io.save_checkpoint).parameters


def staged(io: Any) -> None:
    """Wait until what is being saved is copied, so that weights may be written to."""
    if (offered := _offered(io, "staged")) is not None:
        offered()


def load(io: Any, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
    """Load through `io`; `map_location` and `weights_only` go by name and only to plugins that take them.

    Raises:
        CheckpointFormatError: the plugin returned something that is no dict, such as None.
    """
    given = {"map_location": map_location, "weights_only": weights_only}
    accepted = {name: value for name, value in given.items() if value is not None and _takes(io.load_checkpoint, name)}
    loaded = io.load_checkpoint(path, **accepted)
    if not isinstance(loaded, Mapping):
        raise CheckpointFormatError(
            f"{type(io).__name__}.load_checkpoint({str(path)!r}) returned {type(loaded).__name__}, not the dict that "
            "save_checkpoint was given. Return that dict."
        )
    return loaded if isinstance(loaded, dict) else dict(loaded)


def remove(io: Any, path: Any) -> None:
    io.remove_checkpoint(path)


def exists(io: Any, path: Any) -> bool | None:
    """Whether there is a checkpoint at `path`; None where the plugin cannot tell and no file of that name is there."""
    offered = _offered(io, "exists")
    answer = None if offered is None else offered(path)
    if answer is not None:
        return bool(answer)
    return True if Path(str(path)).exists() else None


def list_checkpoints(io: Any, directory: Any) -> list[str] | None:
    """Paths of the checkpoints in `directory`; None where the plugin does not offer it, or wraps one that does not."""
    offered = _offered(io, "list")
    listed = None if offered is None else offered(directory)
    return None if listed is None else [str(path) for path in listed]


def verify(io: Any, path: Any) -> str | None:
    """Check the stored bytes. Returns ``"cannot"`` where the plugin does not offer it, None when they are good.

    Raises:
        CheckpointCorruptError, CheckpointNotFoundError, or what the plugin raises: they are not.
    """
    offered = _offered(io, "verify")
    if offered is None:
        return "cannot"
    return "cannot" if offered(path) == "cannot" else None


def link(io: Any, source: Any, target: Any) -> bool:
    """Give the checkpoint at `source` the second name `target`. False: not offered or not possible, save it again."""
    offered = _offered(io, "link")
    return False if offered is None else offered(source, target) is not False


def takes_every_rank(io: Any) -> bool:
    """Whether `io` is to be called on every rank, and puts together what they have by itself."""
    return bool(getattr(io, "every_rank", False))


def offers(io: Any, capability: str) -> bool:
    """Whether `io` has the optional method `capability`."""
    return _offered(io, capability) is not None


def check(io: Any, checkpoint: dict[str, Any]) -> None:
    """Ask whether `checkpoint` could be stored, without storing it. Nothing happens where it is not offered.

    Raises:
        UnencodableValueError, or what the plugin raises: a value in it cannot be stored as it should be.
    """
    if (offered := _offered(io, "check")) is not None:
        offered(checkpoint)


def probe(io: Any, directory: Any) -> int | None:
    """Free bytes where checkpoints of `directory` go; None where the plugin does not offer it.

    Raises:
        OSError: nothing can be written there.
    """
    offered = _offered(io, "probe")
    return None if offered is None else offered(directory)


def wait(io: Any) -> None:
    """Wait for everything under way; raise what failed."""
    if (offered := _offered(io, "wait")) is not None:
        offered()


def teardown(io: Any) -> None:
    if (offered := _offered(io, "teardown")) is not None:
        offered()


def _offered(io: Any, name: str) -> Callable[..., Any] | None:
    found = getattr(io, name, None)
    return found if callable(found) else None


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)
