"""Metrics as TensorBoard event files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from milepost import _distributed
from milepost._optional import require
from milepost.loggers.local import LocalLogger
from milepost.loggers.logger import plain_metrics, plain_params

_SUFFIX = ".milepost"


class TensorBoardLogger(LocalLogger):
    """Writes TensorBoard events under ``save_dir/name/version_N``. Needs ``pip install 'milepost[tensorboard]'``.

    A run that goes on from a checkpoint in the same `version` has each event once: what was written after the
    checkpoint is about to be written again, so it is cut off. This is done to this class's own files (``….milepost``)
    only, and only where all that the checkpoint knows of is there.

    Args:
        save_dir: folder under which everything is written.
        name: name of the experiment, a folder below `save_dir`; None or "" for none.
        version: number or folder name of the run; the next free number if None.
        log_graph: draw the module when a run begins, if it has an ``example_input_array``.
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
        super().__init__(save_dir, name, version, prefix, sub_dir)
        self._log_graph = log_graph
        self._default_hp_metric = default_hp_metric
        self._kwargs = kwargs
        self._writer: Any = None
        self._continued = False  # what opens a run is in the files already

    @property
    def experiment(self) -> Any:
        """The ``SummaryWriter``, opened on first use. Use it on rank 0 only."""
        if self._writer is None:
            module = require("torch.utils.tensorboard", extra="tensorboard", needed_by="TensorBoardLogger")
            options = {**self._kwargs, "filename_suffix": self._kwargs.get("filename_suffix", "") + _SUFFIX}
            self._writer = module.SummaryWriter(log_dir=self.log_dir, **options)
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
        self,
        params: Mapping[str, Any] | Any = None,
        metrics: Mapping[str, float] | float | None = None,
        step: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Record hyperparameters, in ``hparams.yaml`` and for the dashboard, nested ones as ``a/b``.

        Args:
            metrics: what the dashboard is to compare runs by, with first values; one value is called ``hp_metric``.
            step: of these values.
        """
        if _distributed.rank() != 0:
            return
        super().log_hyperparams(params)
        if self._continued and metrics is None:
            return
        if metrics is None:
            metrics = {"hp_metric": -1} if self._default_hp_metric else {}
        elif not isinstance(metrics, Mapping):
            metrics = {"hp_metric": metrics}
        if not metrics:
            return
        self.log_metrics(metrics, 0 if step is None else step)
        summary = require("torch.utils.tensorboard.summary", extra="tensorboard", needed_by="TensorBoardLogger")
        for part in summary.hparams(_flat(plain_params(params)), dict(metrics)):
            self.experiment._get_file_writer().add_summary(part)

    def log_graph(self, model: torch.nn.Module, input_array: torch.Tensor | None = None) -> None:
        """Draw `model`, if ``log_graph=True`` was given and there is an input to trace it with."""
        example = getattr(model, "example_input_array", None) if input_array is None else input_array
        if self._log_graph and example is not None and not self._continued and _distributed.rank() == 0:
            self.experiment.add_graph(model, example)

    def save(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def finalize(self, status: str) -> None:
        """Flush and close the event file; a later `log_metrics` opens another beside it."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def state_dict(self) -> dict[str, Any]:
        """How long each event file is, in bytes, all of it written."""
        self.save()
        return {"files": {path.name: path.stat().st_size for path in self._files()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Cut off what was recorded after the checkpoint."""
        lengths, present = state_dict["files"], {path.name: path for path in self._files()}
        known = lengths and all(name in present and present[name].stat().st_size >= lengths[name] for name in lengths)
        if _distributed.rank() != 0 or not known:
            return
        self._continued = True
        for name, path in present.items():
            if name in lengths:
                os.truncate(path, lengths[name])
            else:
                path.unlink()  # begun after the checkpoint

    def _files(self) -> list[Path]:
        return sorted(Path(self.log_dir).glob(f"events.out.tfevents.*{_SUFFIX}"))


def _flat(params: Mapping[str, Any], lead: str = "") -> dict[str, Any]:
    """Values that the dashboard takes, by path: numbers, text and switches as they are, all others as text."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{lead}{key}/"))
        else:
            flat[f"{lead}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
