"""The half of ModelCheckpoint that says what is there: file names, the public attributes, the state."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from milepost.callbacks import _record
from milepost.callbacks._ledger import Ledger
from milepost.callbacks._naming import fill, unused
from milepost.callbacks._saver import Saver
from milepost.callbacks.checkpoint import Checkpoint
from milepost.engine.retention import Change, Entry
from milepost.errors import CheckpointError, MisconfigurationException
from milepost.plugins.io import checkpoint_io as capabilities

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer


class CatalogedCheckpoint(Checkpoint):
    """A checkpointer that knows its files. Their names come from a template; the constants may be set per instance."""

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    dirpath: str | None
    filename: str | None
    monitor: str | None
    auto_insert_metric_name: bool
    save_top_k: int
    current_score: torch.Tensor | None
    best_model_path: str
    best_model_score: torch.Tensor | None
    best_k_models: dict[str, torch.Tensor]
    kth_best_model_path: str
    kth_value: torch.Tensor
    last_model_path: str
    _enable_version_counter: bool
    _io: Any
    _source: str
    _deferred: bool
    _saver: Saver
    _ledger: Ledger

    @property
    def failed_saves(self) -> int:
        """How many saves have failed, over the restarts of the run."""
        return self._saver.failed_saves

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """The catalog as it will be once all that is on its way, this very save included, is committed."""
        return {
            "monitor": self.monitor,
            "current_score": self.current_score,
            "dirpath": self.dirpath,
            **_record.view(self._ledger.projected, self._ledger.policy),
            "milepost": {
                **_record.encode(self._ledger.committed, self._ledger.projected, self.dirpath or ""),
                "deferred": self._deferred,
                "failed_saves": self.failed_saves,
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the files that `state_dict` lists and that are still there, also where the directory was moved."""
        own = state_dict.get("milepost", {})
        here = self.dirpath or state_dict.get("dirpath") or ""
        self._ledger.committed = _record.restore(state_dict, here, self._source, self._is_there, self._ledger.policy)
        self._ledger.doomed = _record.doomed(state_dict, here)
        self.current_score = state_dict.get("current_score")
        self._deferred = bool(own.get("deferred", False))
        self._saver.failed_saves = int(own.get("failed_saves", 0))
        self._publish()

    # ---- what users call

    def check_monitor_top_k(self, trainer: Trainer, current: torch.Tensor | None = None) -> bool:
        """Whether a checkpoint with the monitored value `current` would be among the best; None never is."""
        if current is None or self.save_top_k == 0:
            return False
        return self._ledger.admits(self._candidate(trainer, float(current)), self._ledger.policy)

    def to_yaml(self, filepath: str | os.PathLike[str] | None = None) -> None:
        """Write ``best_k_models`` (path: score) as YAML, by default to ``best_k_models.yaml`` in the directory."""
        target = Path(filepath) if filepath else Path(self.dirpath or "") / "best_k_models.yaml"
        target.write_text(_record.as_yaml({path: float(score) for path, score in self.best_k_models.items()}))

    def format_checkpoint_name(
        self, metrics: Mapping[str, Any], filename: str | None = None, ver: int | None = None, prefix: str | None = None
    ) -> str:
        """The path of a checkpoint: the template filled from `metrics`, with ``-v{ver}`` where `ver` is given.

        Raises:
            MisconfigurationException: the template names a key that is not in `metrics`.
        """
        name = fill(
            filename or self.filename or f"{{epoch}}{self.CHECKPOINT_JOIN_CHAR}{{step}}",
            metrics,
            insert_names=self.auto_insert_metric_name,
            equals=self.CHECKPOINT_EQUALS_CHAR,
            prefix=prefix or "",
            join=self.CHECKPOINT_JOIN_CHAR,
        )
        if ver is not None:
            name = f"{name}{self.CHECKPOINT_JOIN_CHAR}v{ver}"
        return str(Path(self.dirpath or "", name + self.FILE_EXTENSION)) if self.dirpath else name + self.FILE_EXTENSION

    def file_exists(self, filepath: str | os.PathLike[str], trainer: Trainer) -> bool:
        """Whether there is something at `filepath`, as the checkpoint plugin sees it."""
        found = capabilities.exists(trainer.strategy.checkpoint_io, os.fspath(filepath))
        return os.path.lexists(filepath) if found is None else found

    # ---- what is committed

    def _publish(self) -> None:
        """Show what is committed in the public attributes."""
        vars(self).update(_record.view(self._ledger.committed, self._ledger.policy))

    def _is_there(self, path: str) -> bool | None:
        return None if self._io is None else capabilities.exists(self._io, path)

    def _candidate(self, trainer: Trainer, score: float | None) -> Entry:
        return Entry("\0new", score, trainer.global_step, time.time())

    # ---- names

    def _metrics(self, trainer: Trainer) -> dict[str, Any]:
        return {"epoch": trainer.current_epoch, "step": trainer.global_step, **trainer.callback_metrics}

    def _named(self, metrics: dict[str, Any], *, prefix: str | None = None) -> tuple[str, Exception | None]:
        """The path from the template, or the default one and the reason why the template could not be filled."""
        try:
            return self.format_checkpoint_name(metrics, prefix=prefix), None
        except MisconfigurationException as complaint:
            default = f"{{epoch}}{self.CHECKPOINT_JOIN_CHAR}{{step}}"
            return self.format_checkpoint_name(metrics, filename=default, prefix=prefix), complaint

    def _entry_path(self, trainer: Trainer, candidate: Entry) -> tuple[str, Exception | None]:
        """Where `candidate` goes, and why its template could not be filled. It may take the place of what it drops."""
        metrics = self._metrics(trainer)
        unknown = candidate.score is not None and not candidate.scored
        if unknown and self.monitor is not None:
            metrics[self.monitor] = math.nan  # never a stale value in a file's name
        path, complaint = self._named(metrics)
        ledger = self._ledger
        after = ledger.projected.after(Change(entry=candidate), ledger.policy)
        own = ledger.projected.paths() - after.paths()
        return self._free(trainer, path, own=own), None if unknown else complaint

    def _last_path(self, trainer: Trainer) -> str:
        path = self.format_checkpoint_name(self._metrics(trainer), filename=self.CHECKPOINT_NAME_LAST)
        return self._free(trainer, path, own=frozenset({self._ledger.projected.last, self._source}))

    def _free(self, trainer: Trainer, path: str, *, own: frozenset[str]) -> str:
        """`path` if nothing of others is there or versions are off, else with the first version that is free."""
        if not self._enable_version_counter:
            return path
        stem = path.removesuffix(self.FILE_EXTENSION)

        def taken(candidate: str) -> bool:
            used = self._ledger.claims(candidate) or self.file_exists(candidate, trainer)
            return used and candidate not in own and not self._damaged(candidate, trainer)

        def version(number: int) -> str:
            return f"{stem}{self.CHECKPOINT_JOIN_CHAR}v{number}{self.FILE_EXTENSION}"

        return unused(path, version, taken, self.STARTING_VERSION)

    def _damaged(self, path: str, trainer: Trainer) -> bool:
        """Whether `path` holds what a resumed run had to pass over: its name is free again."""
        if not self._source:
            return False
        try:
            capabilities.verify(trainer.strategy.checkpoint_io, path)
        except CheckpointError:
            return True
        return False
