"""The calls to one CheckpointIO, whatever of the contract it has, and the handles of its saves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from milepost.errors import CheckpointFormatError


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
    return offered(io, "staged") is not None and "optimizers" in inspect.signature(io.save_checkpoint).parameters


def load(
    io: Any, path: Any, map_location: Any = None, weights_only: bool | None = None, mapped: bool | None = None
) -> dict[str, Any]:
    """Load through `io`; `map_location`, `weights_only` and `mapped` go by name and only to plugins that take them.

    Raises:
        CheckpointFormatError: the plugin returned something that is no dict, such as None.
    """
    given = {"map_location": map_location, "weights_only": weights_only, "mapped": mapped}
    accepted = {name: value for name, value in given.items() if value is not None and _takes(io.load_checkpoint, name)}
    loaded = io.load_checkpoint(path, **accepted)
    if not isinstance(loaded, Mapping):
        raise CheckpointFormatError(
            f"{type(io).__name__}.load_checkpoint({str(path)!r}) returned {type(loaded).__name__}, not the dict that "
            "save_checkpoint was given. Return that dict."
        )
    return loaded if isinstance(loaded, dict) else dict(loaded)


def offered(io: Any, name: str) -> Callable[..., Any] | None:
    """The optional method `name` of `io`, or None."""
    found = getattr(io, name, None)
    return found if callable(found) else None


def wait(io: Any) -> None:
    """Wait for everything under way; raise what failed."""
    if (method := offered(io, "wait")) is not None:
        method()


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)
