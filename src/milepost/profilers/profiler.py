"""What the Trainer asks of a profiler, and where a report goes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Profiler:
    """Derive from this and override `start`, `stop` and `summary`.

    The Trainer calls `setup` when a run begins, `profile` around each action, and `describe` and `teardown` when the
    run ends, after an error too. Each rank profiles itself. Without a Trainer, use `profile` and `describe` alone.

    Args:
        dirpath: folder of what is written; the run's ``trainer.log_dir`` if None (the working directory without one).
        filename: the report goes to ``STAGE-filename.txt``, several runs into one file; printed if None.
    """

    def __init__(self, dirpath: str | os.PathLike[str] | None = None, filename: str | None = None) -> None:
        self.dirpath = dirpath
        self.filename = filename
        self._stage: str | None = None
        self._local_rank: int | None = None
        self._log_dir: str | os.PathLike[str] | None = None

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | os.PathLike[str] | None = None) -> None:
        """A run begins.

        Args:
            stage: fit, validate, test or predict.
            local_rank: of this process, where there are several.
            log_dir: folder to write to unless `dirpath` was given.
        """
        self._stage, self._local_rank, self._log_dir = stage, local_rank, log_dir

    def start(self, action_name: str) -> None:
        """An action begins, such as ``"run_training_batch"``. Actions of different names may nest."""

    def stop(self, action_name: str) -> None:
        """The action ends."""

    def summary(self) -> str:
        """What was found, as text."""
        return ""

    def describe(self) -> None:
        """Write the summary to the file, or print it where no `filename` was given (on the node's first rank)."""
        text = self.summary()
        if not text:
            return
        if self.filename is not None:
            with self._path(".txt").open("a") as file:
                file.write(text)
        elif not self._local_rank:
            print(text)

    def teardown(self, stage: str | None) -> None:
        """The run has ended."""

    @contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        """Profile the block, one that raises too."""
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)

    @property
    def _directory(self) -> Path | None:
        chosen = self.dirpath or self._log_dir
        return None if chosen is None else Path(chosen)

    def _path(self, extension: str, *more: str) -> Path:
        """Where to write a file of this run, its folder made; `more` goes into the name."""
        directory = self._directory or Path()
        directory.mkdir(parents=True, exist_ok=True)
        return directory / (self._stem(*more) + extension)

    def _stem(self, *more: str) -> str:
        rank = None if self._local_rank is None else str(self._local_rank)
        parts = [part for part in (self._stage, self.filename, rank, *more) if part]
        return re.sub(r"[^\w.()\[\]{}=+-]+", "_", "-".join(parts)) or "profile"

    def _title(self) -> str:
        rank = "" if self._local_rank is None else f", rank {self._local_rank}"
        return f"{self._stage.upper() + ' ' if self._stage else ''}Profiler Report{rank}\n"


class PassThroughProfiler(Profiler):
    """Measures nothing and costs nothing. The Trainer's default."""
