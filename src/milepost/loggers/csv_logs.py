"""Metrics as one CSV file per run."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milepost import _distributed
from milepost.errors import MisconfigurationException
from milepost.loggers.local import LocalLogger, replace
from milepost.loggers.logger import plain_metrics


class CSVLogger(LocalLogger):
    """Writes ``metrics.csv`` and ``hparams.yaml`` under ``save_dir/name/version_N``.

    Rows are appended, and a file that is already there is taken over. A metric that first appears later gets a new
    column; the file is then rewritten beside itself and put in place at once, so that a crash leaves the old file or
    the new one.

    A run that goes on from a checkpoint in the same `version` has each row once: what was written after the checkpoint
    is about to be written again, so those rows are taken out. This happens only where the file holds the rows that the
    checkpoint knows of; the rows of another run are left alone.

    Args:
        save_dir: folder under which everything is written.
        name: name of the experiment, a folder below `save_dir`; None or "" for none.
        version: number or folder name of the run; the next free number if None.
        prefix: put before each metric's name, as ``prefix-name``.
        flush_logs_every_n_steps: rows are written once so many steps have passed, or so many rows are collected; also
            with each checkpoint, and when the run ends.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version, prefix)
        if flush_logs_every_n_steps < 1:
            raise MisconfigurationException(
                f"flush_logs_every_n_steps is {flush_logs_every_n_steps!r}, but rows are written every so many steps: "
                "give 1 or more"
            )
        self._flush_every = flush_logs_every_n_steps
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] | None = None  # of the file, once it was looked at
        self._written = 0
        self._flushed_step = -1
        self._last_row: dict[str, str] = {}

    @property
    def metrics_file(self) -> Path:
        """Where the rows are."""
        return Path(self.log_dir) / "metrics.csv"

    @property
    def experiment(self) -> CSVLogger:
        """The logger itself: there is no client behind it."""
        return self

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Collect one row; it reaches the disk every `flush_logs_every_n_steps` steps, or with `save`."""
        if _distributed.rank() != 0:
            return
        row = plain_metrics(metrics, self._prefix)
        step = self._written + len(self._rows) if step is None else step
        self._rows.append({**row, "step": step})
        if len(self._rows) >= self._flush_every or step - self._flushed_step >= self._flush_every:
            self.save()
            self._flushed_step = max(step, self._flushed_step)

    def save(self) -> None:
        """Write the collected rows."""
        if not self._rows:
            return
        self._look()
        assert self._columns is not None
        if missing := sorted({key for row in self._rows for key in row} - set(self._columns)):
            self._columns = [*self._columns, *missing]
            self._rewrite(_read(self.metrics_file))
        with self.metrics_file.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerows(self._rows)
        self._written += len(self._rows)
        self._last_row = {key: str(value) for key, value in self._rows[-1].items()}
        self._rows = []

    def state_dict(self) -> dict[str, Any]:
        """How many rows there are, those not written yet too, and the last one. Nothing but on rank 0, which writes."""
        if _distributed.rank() != 0:
            return {}
        self._look()
        last = {key: str(value) for key, value in self._rows[-1].items()} if self._rows else dict(self._last_row)
        count = self._written + len(self._rows)
        return {"rows": count, "last": last, "log_dir": str(Path(self.log_dir).resolve())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take out the rows that were written after the checkpoint."""
        if _distributed.rank() != 0 or not self.metrics_file.exists():
            return
        self._look()
        rows, count = _read(self.metrics_file), state_dict["rows"]
        if count >= len(rows):
            return
        same_place = str(Path(self.log_dir).resolve()) == state_dict["log_dir"]
        if _filled(rows[count - 1]) == state_dict["last"] if count else same_place:
            self._rewrite(rows[:count])

    def _look(self) -> None:
        """Take over a file that is there already; end a last line that a killed process left unfinished."""
        if self._columns is not None:
            return
        path = self.metrics_file
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            self._columns = []
            return
        if (text := path.read_bytes()) and not text.endswith(b"\n"):
            with path.open("ab") as file:
                file.write(b"\r\n")
        rows = _read(path)
        with path.open(newline="") as file:
            self._columns = next(csv.reader(file), [])
        self._written, self._last_row = len(rows), _filled(rows[-1]) if rows else {}

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        assert self._columns is not None
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        replace(self.metrics_file, text.getvalue())
        self._written, self._last_row = len(rows), _filled(rows[-1]) if rows else {}


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _filled(row: dict[str, Any]) -> dict[str, str]:
    """What a row says, whatever columns were added since."""
    return {key: value for key, value in row.items() if key and value}
