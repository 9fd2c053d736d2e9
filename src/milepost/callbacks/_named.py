"""The naming half of ModelCheckpoint: templates, versions, and what is at a path already."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milepost.callbacks._naming import fill, unused
from milepost.callbacks._saver import Saver
from milepost.callbacks.checkpoint import Checkpoint
from milepost.errors import CheckpointError, MisconfigurationException
from milepost.plugins.io import checkpoint_io as capabilities

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer


class NamedCheckpoint(Checkpoint):
    """A checkpointer whose file names come from a template. The constants may be set on an instance."""

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    dirpath: str | None
    filename: str | None
    auto_insert_metric_name: bool
    _enable_version_counter: bool
    _source: str
    _saver: Saver

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

    def _metrics(self, trainer: Trainer) -> dict[str, Any]:
        return {"epoch": trainer.current_epoch, "step": trainer.global_step, **trainer.callback_metrics}

    def _named(self, metrics: dict[str, Any], *, prefix: str | None = None) -> tuple[str, Exception | None]:
        """The path from the template, or the default one and the reason why the template could not be filled."""
        try:
            return self.format_checkpoint_name(metrics, prefix=prefix), None
        except MisconfigurationException as complaint:
            default = f"{{epoch}}{self.CHECKPOINT_JOIN_CHAR}{{step}}"
            return self.format_checkpoint_name(metrics, filename=default, prefix=prefix), complaint

    def _free(self, trainer: Trainer, path: str, *, own: frozenset[str]) -> str:
        """`path` if nothing of others is there or versions are off, else with the first version that is free."""
        if not self._enable_version_counter:
            return path
        stem = path.removesuffix(self.FILE_EXTENSION)

        def taken(candidate: str) -> bool:
            used = self._saver.ledger.claims(candidate) or self.file_exists(candidate, trainer)
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
