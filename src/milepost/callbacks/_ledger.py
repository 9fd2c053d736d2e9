"""A checkpointer's saves between their start and their commit, followed on the main thread."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from milepost.callbacks._naming import relative
from milepost.engine.retention import Catalog, Change, Entry, Retention, obsolete
from milepost.errors import CheckpointSaveError
from milepost.plugins.io import checkpoint_io as capabilities

_SPARE = ".link"


@dataclass(eq=False, slots=True)
class Save:
    """One file on its way.

    Attributes:
        path: destination.
        change: what its commit does to the catalog.
        link_to: a second name for the same bytes, made at commit, or "".
        symbolic: whether that second name is a relative symbolic link.
        record: what the index is told of it: step, epoch, metrics, score, time.
        pending: the handle of the save, None until it has been handed over.
    """

    path: str
    change: Change
    link_to: str = ""
    symbolic: bool = False
    record: dict[str, Any] = field(default_factory=dict)
    pending: Any = None


class Ledger:
    """What is committed and what is on its way.

    A save counts only once its handle is done: then the catalog changes, the second name is made and what retention no
    longer keeps is deleted, in this order, so that a crash in between leaves too much rather than too little.
    """

    def __init__(self, policy: Retention, *, weights_only: bool) -> None:
        self.policy = policy
        self.weights_only = weights_only
        self.committed = Catalog()
        self.doomed: list[str] = []  # what a run that died between a commit and its removals has left
        self.dirpath = ""
        self.announce: Callable[[str], None] = lambda path: None  # told before each save
        self._in_flight: list[Save] = []

    @property
    def projected(self) -> Catalog:
        """The catalog as it will be when all that is on its way is committed."""
        catalog = self.committed
        for save in self._in_flight:
            catalog = catalog.after(save.change, self.policy)
        return catalog

    def admits(self, candidate: Entry, policy: Retention) -> bool:
        """Whether `policy` would keep `candidate`, the newest, beside all that is there or on its way."""
        return policy.admits(self.projected.entries, candidate)

    def claims(self, path: str) -> bool:
        """Whether a save on its way writes to `path`."""
        return any(path in (save.path, save.link_to) for save in self._in_flight)

    def submit(self, trainer: Any, saves: Sequence[Save]) -> None:
        """Hand `saves` over. All of them show in `projected` while each is serialised.

        Raises whatever a synchronous save raises; that save and those after it are then as if never asked for.
        """
        self._in_flight.extend(saves)
        try:
            for save in saves:
                _prepare(save.path, trainer.global_step)
                if trainer.world_size > 1:
                    for logger in trainer.loggers:
                        logger.save()  # before others are told: where it fails, nobody waits for a save of all ranks
                self.announce(save.path)
                save.pending = trainer.save_checkpoint(save.path, self.weights_only)
        finally:
            # A trainer that returns nothing has finished by the time it returns; one that raised has set no handle.
            begun = [save for save in saves if save.pending is not None]
            for save in saves[len(begun) :]:
                self._in_flight.remove(save)

    def poll(self, trainer: Any, committed: Callable[[Save, list[str]], None], *, wait: bool = False) -> None:
        """Commit what is done, in the order of the saves, with `wait` all.

        After each, `committed` is called with the save and the paths that its commit removed.

        Raises:
            Exception: what made the oldest save fail. It is forgotten; a further call goes on with the next.
        """
        while self._in_flight and (wait or self._in_flight[0].pending.done()):
            save = self._in_flight.pop(0)
            save.pending.result()
            if getattr(save.pending, "failed", False):
                continue  # its error went to someone else who waited for the plugin
            committed(save, self._commit(trainer, save))

    def prune(self, trainer: Any) -> list[str]:
        """Apply the policy to what is committed, which may keep fewer than when the entries were made, and delete what
        the run before did not come to. Returns the paths removed.
        """
        kept = replace(self.committed, entries=self.policy.retain(self.committed.entries))
        removed = self._switch(trainer, kept, Change())
        _sweep_links(self.dirpath)
        left, self.doomed = [path for path in self.doomed if path not in kept.paths()], []
        there = [path for path in left if Path(path).exists() and self._removable(trainer, path)]
        return removed + [path for path in there if self._remove(trainer, path)]

    def _commit(self, trainer: Any, save: Save) -> list[str]:
        change = save.change
        unlinked = bool(save.link_to) and not _link(trainer, save)
        if unlinked:
            change = replace(change, last="")
        removed = self._switch(trainer, self.committed.after(change, self.policy), change)
        if unlinked and trainer.world_size == 1:
            # The bytes cannot get a second name: save the state of now, which is at least as new.
            last = Save(save.link_to, Change(last=save.link_to, crash=change.crash), record=save.record)
            self.submit(trainer, [last])
        return removed

    def _switch(self, trainer: Any, after: Catalog, change: Change) -> list[str]:
        gone = obsolete(self.committed, after)
        if change.entry is not None and change.entry not in after.entries:
            gone.append(change.entry.path)  # a better one was committed while this one was on its way
        self.committed = after
        doomed = [path for path in gone if not self.claims(path) and self._removable(trainer, path)]
        return [path for path in doomed if self._remove(trainer, path)]

    def _removable(self, trainer: Any, path: str) -> bool:
        """Never the file that the run resumed from, never what lies outside the directory."""
        source = trainer.ckpt_path
        if source and os.path.realpath(path) == os.path.realpath(source):
            return False
        return "://" in path or relative(path, self.dirpath) is not None

    def _remove(self, trainer: Any, path: str) -> bool:
        """Returns whether nothing is at `path` any more."""
        last = Path(self.committed.last) if self.committed.last else None
        if last is not None and last.is_symlink() and os.path.realpath(last) == os.path.realpath(path):
            last.unlink()
            Path(path).rename(last)  # the newest state outlives its place among the best
            return True
        try:
            trainer.strategy.remove_checkpoint(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            warnings.warn(f"the old checkpoint {path} could not be deleted: {error}. Delete it by hand", stacklevel=2)
            return False
        return True


def _prepare(path: str, step: int) -> None:
    if "://" in path:
        return
    place = Path(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_symlink():
            place.unlink()  # a plugin that opens the path itself would write through the link, over what it points to
    except OSError as error:
        raise CheckpointSaveError(
            f"The checkpoint of step {step} cannot be saved to {path!r}: {type(error).__name__}: {error}. "
            "Give another dirpath, or make this one a directory that can be written to",
            path=path,
            step=step,
        ) from error


def _sweep_links(directory: str) -> None:
    """Remove symbolic links that a killed process made and did not come to put in place."""
    if "://" not in directory:
        for stale in Path(directory).glob(f".*{_SPARE}"):
            if stale.is_symlink():
                stale.unlink()


def _link(trainer: Any, save: Save) -> bool:
    if save.symbolic:
        target = Path(save.link_to)
        spare = target.with_name(f".{target.name}{_SPARE}")
        try:
            spare.unlink(missing_ok=True)
            spare.symlink_to(os.path.relpath(save.path, target.parent))
            spare.replace(target)
            return True
        except OSError:
            pass  # a file system without symbolic links
    return bool(capabilities.link(trainer.strategy.checkpoint_io, save.path, save.link_to))
