"""What the Trainer asks of a logger."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from milepost import _distributed

if TYPE_CHECKING:
    from milepost.callbacks.checkpoint import Checkpoint

T = TypeVar("T")


class Logger:
    """Derive from this to send metrics elsewhere. Every method may stay as it is, which does nothing.

    The Trainer calls a logger on global rank 0 only, on the main thread; `name`, `version` and the directories are read
    on every rank.
    """

    @property
    def name(self) -> str | None:
        """Name of the experiment, the folder below `save_dir`."""
        return None

    @property
    def version(self) -> int | str | None:
        """Which run of the experiment this is."""
        return None

    group_separator = "/"
    """Put between the parts of a name, as in ``DeviceStatsMonitor.on_train_start/cpu_percent``."""

    @property
    def save_dir(self) -> str | None:
        """Folder under which the logger and the checkpoints of its run are written, or None for a remote logger."""
        return None

    @property
    def root_dir(self) -> str | None:
        """Folder of the experiment, ``save_dir/name``."""
        return None if self.save_dir is None else str(Path(self.save_dir) / (self.name or ""))

    @property
    def log_dir(self) -> str | None:
        """Folder of this run, ``save_dir/name/version``; an integer version is spelled ``version_3``."""
        if self.root_dir is None:
            return None
        version = self.version
        return str(Path(self.root_dir) / (version if isinstance(version, str) else f"version_{version}"))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record scalar `metrics` as of `step` (``global_step`` unless the user logged a ``step`` of their own)."""

    def log_hyperparams(self, params: Mapping[str, Any] | Any, *args: Any, **kwargs: Any) -> None:
        """Record the hyperparameters of the run."""

    def log_graph(self, model: torch.nn.Module, input_array: torch.Tensor | None = None) -> None:
        """Record the graph of `model`."""

    def save(self) -> None:
        """Write out what was recorded so far."""

    def finalize(self, status: str) -> None:
        """Called when the run ends, with ``"success"`` or ``"failed"``. Write out what is left."""
        self.save()

    def state_dict(self) -> dict[str, Any]:
        """How far the record has come, plain and small. A checkpoint is written after `save`."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A run goes on from a checkpoint: what was recorded after it is going to be recorded once more.

        Called before anything is recorded, with what `state_dict` returned when the checkpoint was written.
        """

    def after_save_checkpoint(self, checkpoint_callback: Checkpoint) -> None:
        """Called once a checkpoint of `checkpoint_callback` is durable, so that its file may be read or uploaded."""

    def after_remove_checkpoint(self, path: str) -> None:
        """Called when retention has given up the checkpoint at `path`, so that a copy elsewhere may go too.

        It is deleted by then; an asynchronous plugin deletes it behind the saves that were asked for before.
        """


class DummyLogger(Logger):
    """Takes the place of the loggers under ``fast_dev_run``: everything can be called, nothing is written."""

    @property
    def experiment(self) -> Any:
        """Stands for the writer of any logger."""
        return _Nothing()

    def __getattr__(self, name: str) -> Any:
        return _Nothing()


def rank_zero_experiment(fn: Callable[[Any], T]) -> Callable[[Any], T]:
    """Under ``@property``, for a logger's ``experiment``: rank 0 makes it, and the others get one that does nothing."""

    @functools.wraps(fn)
    def experiment(logger: Any) -> T:
        return fn(logger) if _distributed.rank() == 0 else cast("T", _Nothing())

    return experiment


class _Nothing:
    """Any attribute, item or call of it is another one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # not an array, nor a context, nor anything else that Python asks for by protocol
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


def plain_params(params: Any) -> dict[str, Any]:
    """Hyperparameters (a mapping, a namespace or None) as a dict."""
    if params is None:
        return {}
    return dict(params) if isinstance(params, Mapping) else dict(vars(params))


def plain_metrics(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """`metrics` as floats, each name preceded by ``prefix-`` where there is a prefix."""
    lead = f"{prefix}-" if prefix else ""
    return {lead + name: v.item() if isinstance(v, torch.Tensor) else v for name, v in metrics.items()}
