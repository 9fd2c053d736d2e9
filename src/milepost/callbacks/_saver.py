"""From a decision to a committed file, and who is told of it: the index, the checkpointer, the loggers."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from milepost.callbacks._ledger import Ledger, Save
from milepost.callbacks._naming import relative
from milepost.engine.retention import Change, Retention
from milepost.errors import CheckpointFormatError, MisconfigurationException
from milepost.plugins.io.index import Record, read_index, update_index

OnSaveError = Literal["raise", "continue"]
Link = Literal["none", "hard", "symbolic"]


class Saver:
    """A checkpointer's way to the plugin.

    Args:
        policy: what is kept.
        weights_only: leave out what only a resumed run needs.
        on_error: what a failed save does: end the run, or be counted while training goes on.
        committed: called with the trainer and the save once it is durable.

    Attributes:
        ledger: what is committed and what is on its way.
        failed_saves: how many saves have failed so far.
    """

    def __init__(
        self,
        policy: Retention,
        *,
        weights_only: bool,
        on_error: OnSaveError,
        committed: Callable[[Any, Save], None],
    ) -> None:
        if on_error not in ("raise", "continue"):
            raise MisconfigurationException(f"on_save_error={on_error!r} must be 'raise' or 'continue'")
        self.ledger = Ledger(policy, weights_only=weights_only)
        self.on_error = on_error
        self.failed_saves = 0
        self._committed = committed

    def save(self, trainer: Any, path: str, change: Change, record: Record, *, last: str, link: Link) -> bool:
        """Save to `path` and to `last` ("" for neither), with one write if it can be.

        Args:
            change: what the commit means, the last apart.
            record: what the index is told.
            link: how the last becomes a second name of the file at `path`.

        Returns:
            Whether the saves were handed over.

        Raises:
            OSError: they were not, and a failure ends the run.
        """
        joint = bool(path and last) and link != "none"
        saves = []
        if path:
            second = last if joint else ""
            saves.append(Save(path, replace(change, last=second), second, link == "symbolic", record))
        if last and not joint:
            saves.append(Save(last, Change(last=last, crash=change.crash), record=record))
        error = self._submit(trainer, saves)
        if error is not None and getattr(error, "path", None) not in (None, *(save.path for save in saves)):
            # A plugin that writes in the background told of an earlier save that failed, and did not begin this one.
            error = self._submit(trainer, saves)
        return error is None

    def poll(self, trainer: Any, *, wait: bool = False) -> bool:
        """Commit what is done, with `wait` all, and tell of it. Returns whether none of it had failed.

        Raises:
            OSError: a save had failed, and a failure ends the run.
        """

        def commit(save: Save, removed: list[str]) -> None:
            self._index(trainer, [*_records(save, self.ledger.dirpath)], removed)
            self._committed(trainer, save)
            _tell_of_removal(trainer, removed)

        before = self.failed_saves
        while True:
            try:
                self.ledger.poll(trainer, commit, wait=wait)
                return self.failed_saves == before
            except OSError as error:
                self._failed(trainer, error)

    def take_up(self, trainer: Any, monitor: str | None) -> None:
        """Apply the policy to what was restored, and tell the index of what a run that died has not told it."""
        removed = self.ledger.prune(trainer)
        put = self._untold(trainer, monitor)
        if removed or put:
            self._index(trainer, put, removed)
        _tell_of_removal(trainer, removed)

    def _untold(self, trainer: Any, monitor: str | None) -> list[Record]:
        """Records of the files that hold the state resumed from, where the index has none."""
        catalog, directory = self.ledger.committed, self.ledger.dirpath
        entry = next((e for e in catalog.entries if e.step == trainer.global_step), None)
        same = bool(catalog.last) and bool(trainer.ckpt_path) and _same(catalog.last, trainer.ckpt_path)
        files = ([(entry.path, "ranked")] if entry else []) + ([(catalog.last, "last")] if same else [])
        if not files or "://" in directory:
            return []
        try:
            told = {record["path"] for record in read_index(directory)}
        except CheckpointFormatError:
            told = set()
        known = describe(trainer, trainer.callback_metrics, monitor, entry.score if entry else None)
        records = [{"path": relative(path, directory) or path, "kind": kind, **known} for path, kind in files]
        return [record for record in records if record["path"] not in told]

    def _submit(self, trainer: Any, saves: Sequence[Save]) -> OSError | None:
        try:
            self.ledger.submit(trainer, saves)
        except OSError as error:
            self._failed(trainer, error)
            return error
        return None

    def _failed(self, trainer: Any, error: OSError) -> None:
        others = getattr(error, "others", ())  # further ones that an asynchronous plugin reports with the first
        self.failed_saves += 1
        if self.on_error == "raise":
            self.failed_saves += len(others)
            raise error
        step = getattr(error, "step", None)  # of a save in the background: earlier than now
        warnings.warn(
            f"NOT SAVED at step {trainer.global_step if step is None else step} ({self.failed_saves} failed so far): "
            f"{error} Training goes on; the newest checkpoint is an older one until a save succeeds",
            stacklevel=2,
        )
        for other in others:
            self._failed(trainer, other)

    def _index(self, trainer: Any, put: list[Record], removed: Sequence[str]) -> None:
        directory = self.ledger.dirpath
        if "://" in directory or not trainer.is_global_zero:
            return
        try:
            update_index(directory, put=put, drop=[relative(path, directory) or path for path in removed])
        except OSError as error:  # the checkpoint itself is safe
            warnings.warn(f"the list of checkpoints in {directory} is not up to date: {error}", stacklevel=2)


def describe(trainer: Any, metrics: dict[str, Any], monitor: str | None, score: float | None) -> Record:
    """What the index will say of the state that is saved now."""
    return {
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "monitor": monitor,
        "score": score,
        "metrics": {name: float(value) for name, value in metrics.items() if name not in ("epoch", "step")},
        "time": time.time(),
    }


def _same(path: str, other: str) -> bool:
    return Path(path).exists() and Path(other).exists() and Path(path).samefile(other)


def _records(save: Save, directory: str) -> list[Record]:
    change = save.change
    kind = "ranked" if change.entry is not None else "exception" if change.crash else "last"
    files = [(save.path, kind)] + ([(save.link_to, "last")] if save.link_to and os.path.lexists(save.link_to) else [])
    return [{"path": relative(path, directory) or path, "kind": kind, **save.record} for path, kind in files]


def _tell_of_removal(trainer: Any, removed: Sequence[str]) -> None:
    for logger in trainer.loggers:
        tell = getattr(logger, "after_remove_checkpoint", None)
        for path in removed:
            if tell is not None:
                tell(path)
