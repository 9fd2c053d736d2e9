"""Checkpointers on many ranks: rank 0 decides what is saved and deleted, the others save with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from milepost import _distributed
from milepost.callbacks._saver import Saver
from milepost.engine.retention import Catalog
from milepost.errors import CheckpointSaveError


@dataclass(frozen=True)
class _Outcome:
    """What has come of a decision, on rank 0."""

    catalog: Catalog
    failed_saves: int
    current_score: Any
    error: str | None


class Followers:
    """Takes the other ranks through what rank 0 decides. On a single rank it is not there at all.

    Called on every rank, at points that all of them reach: the end of a batch at which a trigger fires, of a
    validation, of an epoch, of the run. What rank 0 does between two of them (committing what has become durable,
    deleting what is not kept) it does by itself; the others hear of it at the next.
    """

    def __init__(self, saver: Saver) -> None:
        self._saver = saver
        self._pending: list[Any] = []

    def decide(self, trainer: Any, decision: Callable[[], None], owner: Any) -> None:
        """Run `decision` on rank 0, and on every rank the saves that it asks for.

        Raises:
            Exception: what `decision` raises; on the other ranks a CheckpointSaveError that tells of it.
        """
        if trainer.world_size == 1:
            decision()
        elif trainer.is_global_zero:
            self._lead(decision, owner)
        else:
            self._follow(trainer, owner)

    def _lead(self, decision: Callable[[], None], owner: Any) -> None:
        ledger, error = self._saver.ledger, None
        ledger.announce = _announce
        try:
            decision()
        except Exception as raised:
            error = raised
        finally:
            ledger.announce = lambda path: None
        told = None if error is None else f"{type(error).__name__}: {error}"
        outcome = _Outcome(ledger.committed, self._saver.failed_saves, owner.current_score, told)
        _distributed.broadcast_object(outcome)
        if error is not None:
            raise error

    def _follow(self, trainer: Any, owner: Any) -> None:
        failures: list[OSError] = []  # told only once rank 0 is done: it may go on to the next save
        while isinstance(order := _announced(), str):
            failures += self._ended()
            try:
                self._pending.append(trainer.save_checkpoint(order, self._saver.ledger.weights_only))
            except OSError as error:
                failures.append(error)
        outcome = order
        self._saver.ledger.committed = outcome.catalog
        self._saver.failed_saves, owner.current_score = outcome.failed_saves, outcome.current_score
        owner._publish()
        self._tell(failures)
        if outcome.error is not None:
            raise CheckpointSaveError(f"The checkpointer failed on rank 0: {outcome.error}")

    def settle(self, *, wait: bool = False) -> None:
        """On the other ranks: hear of what has become of this rank's part of the saves that have ended."""
        self._tell(self._ended(wait=wait))

    def _ended(self, *, wait: bool = False) -> list[OSError]:
        failures: list[OSError] = []
        while self._pending and (wait or self._pending[0].done()):
            try:
                self._pending.pop(0).result()
            except OSError as error:
                failures.append(error)
        return failures

    def _tell(self, failures: list[OSError]) -> None:
        for error in failures:
            if self._saver.on_error == "raise":
                raise error
            warnings.warn(f"NOT SAVED on rank {_distributed.rank()}: {error} Training goes on", stacklevel=2)


def _announce(path: str) -> None:
    _distributed.broadcast_object(path)


def _announced() -> Any:
    """The path that rank 0 saves to next, or what has come of its decision."""
    return _distributed.broadcast_object(None)
