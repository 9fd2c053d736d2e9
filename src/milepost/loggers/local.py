"""Loggers that write into a folder of this machine: where the folder is, and the hyperparameters in it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milepost import _distributed
from milepost.loggers.logger import Logger, plain_params


class LocalLogger(Logger):
    """Writes under ``save_dir/name/version_N/sub_dir``, with the hyperparameters in ``hparams.yaml`` there.

    Args:
        save_dir: folder under which everything is written; ``~`` and ``$VARIABLES`` are resolved.
        name: name of the experiment, a folder below `save_dir`; None or "" for none.
        version: number or folder name of the run; the next free number if None.
        prefix: put before each metric's name, as ``prefix-name``.
        sub_dir: folder below the version's.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self._save_dir = os.path.expandvars(Path(save_dir).expanduser())
        self._name = name or ""
        self._version = version
        self._prefix = prefix
        self.sub_dir = None if sub_dir is None else os.fspath(sub_dir)
        self.hparams: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def root_dir(self) -> str:
        return str(Path(self._save_dir) / self._name)

    @property
    def version(self) -> int | str:
        if self._version is None:
            self._version = next_version(self.root_dir)
        return self._version

    @property
    def log_dir(self) -> str:
        version = self.version if isinstance(self.version, str) else f"version_{self.version}"
        return str(Path(self.root_dir, version, self.sub_dir or ""))

    def agree(self) -> None:
        """Take the version that rank 0 has. Called on every rank at the start of a run."""
        self._version = _distributed.on_rank_zero(lambda: self.version)

    def log_hyperparams(self, params: Mapping[str, Any] | Any = None, *args: Any, **kwargs: Any) -> None:
        """Add to the hyperparameters and write them to ``hparams.yaml``."""
        if _distributed.rank() != 0:
            return
        self.hparams.update(plain_params(params))
        # JSON is YAML too, so the file keeps the name that tools look for without a dependency on a YAML package.
        replace(Path(self.log_dir) / "hparams.yaml", json.dumps(self.hparams, indent=2, default=repr) + "\n")


def next_version(root_dir: str) -> int:
    """The first integer above every ``version_N`` folder in `root_dir`, as this rank sees it.

    No collective: a logger is written by rank 0 alone, and one that had to meet the other ranks there would wait for
    them forever. What all ranks must agree on, the Trainer and the checkpoint callbacks take from rank 0.
    """
    taken = [int(p.name[8:]) for p in Path(root_dir).glob("version_*") if p.is_dir() and p.name[8:].isdigit()]
    return max(taken, default=-1) + 1


def replace(path: Path, text: str) -> None:
    """Write `text` beside `path` and put it in place at once: a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        file.write(text)
    temporary.replace(path)
