"""Metrics as TensorBoard event files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from milepost import _distributed
from milepost._optional import require
from milepost.loggers.logger import Logger, next_version, plain_metrics, plain_params


class TensorBoardLogger(Logger):
    """Writes TensorBoard events under ``save_dir/name/version_N``. Needs ``pip install 'milepost[tensorboard]'``.

    Args:
        save_dir: folder under which everything is written.
        name: name of the experiment, a folder below `save_dir`; None or "" for none.
        version: number or folder name of the run; the next free number if None.
        log_graph: whether `log_graph` draws the model.
        default_hp_metric: record ``hp_metric`` as -1 with the hyperparameters, so that the dashboard lists the run.
        prefix: put before each metric's name, as ``prefix-name``.
        sub_dir: folder below the version's in which the events go.
        kwargs: passed to ``torch.utils.tensorboard.SummaryWriter``.

    Raises:
        MissingDependencyError: tensorboard is not installed.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        require("tensorboard", extra="tensorboard", needed_by="TensorBoardLogger")
        self._save_dir = os.fspath(save_dir)
        self._name = name or ""
        self._version = version
        self._log_graph = log_graph
        self._default_hp_metric = default_hp_metric
        self._prefix = prefix
        self._sub_dir = None if sub_dir is None else os.fspath(sub_dir)
        self._kwargs = kwargs
        self._writer: Any = None

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
    def log_dir(self) -> str:
        directory = super().log_dir
        assert directory is not None  # save_dir is never None here
        return directory if self._sub_dir is None else str(Path(directory) / self._sub_dir)

    @property
    def experiment(self) -> Any:
        """The ``SummaryWriter``, opened on first use. Use it on rank 0 only."""
        if self._writer is None:
            writer = require("torch.utils.tensorboard", extra="tensorboard", needed_by="TensorBoardLogger")
            self._writer = writer.SummaryWriter(log_dir=self.log_dir, **self._kwargs)
        return self._writer

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record each metric as a scalar; a mapping as one chart of several."""
        if _distributed.rank() != 0:
            return
        lead = f"{self._prefix}-" if self._prefix else ""
        for key, value in metrics.items():
            if isinstance(value, Mapping):
                self.experiment.add_scalars(lead + key, plain_metrics(value), step)
            else:
                self.experiment.add_scalar(lead + key, value.item() if isinstance(value, torch.Tensor) else value, step)

    def log_hyperparams(
        self, params: Mapping[str, Any] | Any = None, metrics: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Record hyperparameters; what TensorBoard cannot store as it is, is stored as its repr."""
        if _distributed.rank() != 0:
            return
        if metrics is None:
            metrics = {"hp_metric": -1} if self._default_hp_metric else {}
        elif not isinstance(metrics, Mapping):
            metrics = {"hp_metric": metrics}
        plain = {k: v if isinstance(v, bool | int | float | str) else repr(v) for k, v in plain_params(params).items()}
        if plain and metrics:
            self.experiment.add_hparams(plain, dict(metrics), run_name=".")

    def log_graph(self, model: torch.nn.Module, input_array: torch.Tensor | None = None) -> None:
        """Draw `model`, if ``log_graph=True`` was given and there is an input to trace it with."""
        example = getattr(model, "example_input_array", None) if input_array is None else input_array
        if self._log_graph and example is not None and _distributed.rank() == 0:
            self.experiment.add_graph(model, example)

    def save(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def finalize(self, status: str) -> None:
        """Flush and close the event file; a later `log_metrics` opens another beside it."""
        if self._writer is not None:
            self._writer.flush()
            self._writer.close()
            self._writer = None
