"""Metrics as one CSV file per run."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milepost import _distributed
from milepost.errors import MisconfigurationException
from milepost.loggers.logger import Logger, next_version, plain_metrics, plain_params


class CSVLogger(Logger):
    """Writes ``metrics.csv`` and ``hparams.yaml`` under ``save_dir/name/version_N``.

    Rows are appended, and a file that is already there is taken over: a resumed run that is given the same `version`
    continues it, and no row is ever dropped. A metric that first appears later gets a new column; the file is then
    rewritten beside itself and put in place at once, so that a crash leaves the old file or the new one.

    Args:
        save_dir: folder under which everything is written.
        name: name of the experiment, a folder below `save_dir`; None or "" for none.
        version: number or folder name of the run; the next free number if None.
        prefix: put before each metric's name, as ``prefix-name``.
        flush_logs_every_n_steps: rows are written once this many `log_metrics` calls are collected.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        if flush_logs_every_n_steps < 1:
            raise MisconfigurationException(
                f"flush_logs_every_n_steps is {flush_logs_every_n_steps!r}, but rows are written every so many steps: "
                "give 1 or more"
            )
        self._save_dir = os.fspath(save_dir)
        self._name = name or ""
        self._version = version
        self._prefix = prefix
        self._flush_every = flush_logs_every_n_steps
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] | None = None
        self._hparams: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def version(self) -> int | str:
        if self._version is None:
            self._version = next_version(str(Path(self._save_dir) / self._name))
        return self._version

    @property
    def metrics_file(self) -> Path:
        """Where the rows are."""
        return self._directory / "metrics.csv"

    @property
    def _directory(self) -> Path:
        directory = self.log_dir
        assert directory is not None  # save_dir is never None here
        return Path(directory)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Collect one row; it reaches the disk every `flush_logs_every_n_steps` calls, or with `save`."""
        if _distributed.rank() != 0:
            return
        self._rows.append({**plain_metrics(metrics, self._prefix), "step": len(self._rows) if step is None else step})
        if len(self._rows) >= self._flush_every:
            self.save()

    def log_hyperparams(self, params: Mapping[str, Any] | Any = None, *args: Any, **kwargs: Any) -> None:
        """Add to the hyperparameters and write them to ``hparams.yaml``."""
        if _distributed.rank() != 0:
            return
        self._hparams.update(plain_params(params))
        self._directory.mkdir(parents=True, exist_ok=True)
        # JSON is YAML too, so the file keeps the name that tools look for without a dependency on a YAML package.
        _replace(self._directory / "hparams.yaml", json.dumps(self._hparams, indent=2, default=repr) + "\n")

    def save(self) -> None:
        """Write the collected rows."""
        if not self._rows:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        if self._columns is None:
            _end_line(self.metrics_file)
        columns = self._columns if self._columns is not None else _header(self.metrics_file)
        missing = sorted({key for row in self._rows for key in row} - set(columns))
        if missing:
            columns = [*columns, *missing]
            _widen(self.metrics_file, columns)
        with self.metrics_file.open("a", newline="") as file:
            csv.DictWriter(file, columns).writerows(self._rows)
        self._columns, self._rows = columns, []


def _end_line(path: Path) -> None:
    """End a last line that a killed process left unfinished, so that the next row does not run into it."""
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\r\n")


def _header(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def _widen(path: Path, columns: list[str]) -> None:
    """Rewrite `path` with `columns`, every row kept, or begin it."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
