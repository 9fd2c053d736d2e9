"""The names that users and callbacks read from a Trainer: position, metrics, data, what it is doing, where it runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from milepost import _distributed
from milepost.callbacks.callback import Callback
from milepost.callbacks.checkpoint import Checkpoint
from milepost.trainer.evaluation import EvaluationLoop

if TYPE_CHECKING:
    from milepost.precision.precision import Precision
    from milepost.strategies.strategy import Strategy
    from milepost.trainer.loop import FitLoop
    from milepost.trainer.metrics import Metrics
    from milepost.trainer.signals import SignalFlags


@dataclass
class TrainerState:
    """What the Trainer is doing.

    `fn`: fit, validate, test or predict; `status`: initializing, running, finished or interrupted.
    """

    fn: str | None = None
    status: str = "initializing"
    stage: str | None = None  # train, sanity_check, validate, test, predict

    @property
    def stopped(self) -> bool:
        return self.status in ("finished", "interrupted")


class TrainerSurface:
    """Everything here only reads; the Trainer sets the attributes."""

    callbacks: list[Callback]
    default_root_dir: str
    evaluation_loops: dict[str, EvaluationLoop]
    fit_loop: FitLoop
    loaders: dict[str, Any]
    loggers: list[Any]
    accumulate_grad_batches: int
    max_epochs: int | None
    max_steps: int
    metrics: Metrics
    num_sanity_val_steps: int
    precision_plugin: Precision
    signals: SignalFlags
    state: TrainerState
    strategy: Strategy

    @property
    def lightning_module(self) -> Any:
        return self.strategy.lightning_module

    @property
    def model(self) -> Any:
        return self.strategy.model

    @property
    def optimization(self) -> Any:
        return self.fit_loop.optimization

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Iterator[None]:
        """Parameters of a module built inside are made on the run's device, in the precision's type.

        `empty_init` is taken and without effect: weights are initialized.
        """
        with self.strategy.root_device, self.precision_plugin.init_context():
            yield

    @property
    def validate_loop(self) -> EvaluationLoop:
        return self.evaluation_loops["validation"]

    @property
    def test_loop(self) -> EvaluationLoop:
        return self.evaluation_loops["test"]

    @property
    def predict_loop(self) -> EvaluationLoop:
        return self.evaluation_loops["predict"]

    @property
    def val_check_batch(self) -> int | float:
        """Training batches between two validations; infinite for one at the epoch's end."""
        return self.fit_loop.pace.val_check_batch

    @property
    def global_step(self) -> int:
        """Optimizer steps taken so far."""
        return self.fit_loop.global_step

    @property
    def current_epoch(self) -> int:
        """Epochs completed so far."""
        return self.fit_loop.progress.epoch.current.completed

    @property
    def is_last_batch(self) -> bool:
        return self.fit_loop.progress.batch.is_last_batch

    @property
    def callback_metrics(self) -> dict[str, torch.Tensor]:
        return self.metrics.callback

    @property
    def metric_steps(self) -> dict[str, int]:
        """For each key of `callback_metrics`, the `global_step` at which it was last logged."""
        return self.metrics.steps

    @property
    def logged_metrics(self) -> dict[str, torch.Tensor]:
        return self.metrics.logged

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        return self.metrics.progress_bar

    @property
    def logger(self) -> Any:
        return self.loggers[0] if self.loggers else None

    @property
    def log_dir(self) -> str | None:
        """The first logger's directory, or `default_root_dir`."""
        if self.loggers:
            return getattr(self.loggers[0], "log_dir", None) or getattr(self.loggers[0], "save_dir", None)
        return self.default_root_dir

    @property
    def checkpoint_callbacks(self) -> list[Checkpoint]:
        return [c for c in self.callbacks if isinstance(c, Checkpoint)]

    @property
    def checkpoint_callback(self) -> Checkpoint | None:
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[Any]:
        return [c for c in self.callbacks if type(c).__name__ == "EarlyStopping"]

    @property
    def early_stopping_callback(self) -> Any:
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def progress_bar_callback(self) -> Any:
        return next((c for c in self.callbacks if hasattr(c, "get_metrics")), None)

    @property
    def num_training_batches(self) -> int | float:
        stream = self.fit_loop.stream
        return float("inf") if stream is None else stream.num_batches

    @property
    def num_val_batches(self) -> list[int | float]:
        return self.evaluation_loops["validation"].num_batches

    @property
    def num_sanity_val_batches(self) -> list[int | float]:
        limit = float("inf") if self.num_sanity_val_steps == -1 else self.num_sanity_val_steps
        return [min(limit, n) for n in self.num_val_batches]

    @property
    def num_test_batches(self) -> list[int | float]:
        return self.evaluation_loops["test"].num_batches

    @property
    def num_predict_batches(self) -> list[int | float]:
        return self.evaluation_loops["predict"].num_batches

    @property
    def train_dataloader(self) -> Any:
        """The loaders that `fit` reads, as they were given or returned; None before they were asked for."""
        return getattr(self.fit_loop.stream, "loaders", None)

    @property
    def val_dataloaders(self) -> Any:
        """The loaders that validation reads; None before they were asked for."""
        return getattr(self.evaluation_loops["validation"].stream, "loaders", None)

    @property
    def test_dataloaders(self) -> Any:
        """The loaders that `test` reads; None before they were asked for."""
        return getattr(self.evaluation_loops["test"].stream, "loaders", None)

    @property
    def predict_dataloaders(self) -> Any:
        """The loaders that `predict` reads; None before they were asked for."""
        return getattr(self.evaluation_loops["predict"].stream, "loaders", None)

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps that this fit will take in all. Asking changes nothing: no loader is begun."""
        if self.max_epochs == -1:
            return float("inf") if self.max_steps == -1 else self.max_steps
        self.fit_loop.data.load()
        batches = self.num_training_batches
        if batches == float("inf"):
            return self.max_steps if self.max_steps != -1 else float("inf")
        steps = -(-int(batches) // self.accumulate_grad_batches) * max(self.max_epochs or 0, 1)
        return min(steps, self.max_steps) if self.max_steps != -1 else steps

    @property
    def training(self) -> bool:
        return self.state.stage == "train"

    @property
    def validating(self) -> bool:
        return self.state.stage == "validate"

    @property
    def testing(self) -> bool:
        return self.state.stage == "test"

    @property
    def predicting(self) -> bool:
        return self.state.stage == "predict"

    @property
    def sanity_checking(self) -> bool:
        return self.state.stage == "sanity_check"

    @property
    def evaluating(self) -> bool:
        return self.state.stage in ("validate", "test", "sanity_check")

    @property
    def interrupted(self) -> bool:
        return self.state.status == "interrupted"

    @property
    def precision(self) -> str:
        return self.precision_plugin.precision

    @property
    def scaler(self) -> Any:
        return self.precision_plugin.scaler

    @property
    def global_rank(self) -> int:
        return _distributed.announced_rank()

    @property
    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", 0))

    @property
    def world_size(self) -> int:
        return self.strategy.world_size

    @property
    def num_nodes(self) -> int:
        """Machines that the run uses."""
        return self.strategy.num_nodes

    @property
    def node_rank(self) -> int:
        """Which of the machines this is, from 0."""
        return int(os.environ.get("GROUP_RANK", os.environ.get("NODE_RANK", 0)))

    @property
    def num_devices(self) -> int:
        """Devices that this node trains on."""
        return self.strategy.num_devices

    @property
    def device_ids(self) -> list[int]:
        """Indices of the devices that this node trains on; 0 for the CPU."""
        placement = getattr(self.strategy, "placement", None)
        devices = [self.strategy.root_device] if placement is None else placement.devices
        return [device.index or 0 for device in devices] if devices[0].index is not None else [*range(len(devices))]

    @property
    def is_global_zero(self) -> bool:
        return self.strategy.is_global_zero

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank zero only."""
        if self.is_global_zero:
            print(*args, **kwargs)

    @property
    def received_sigterm(self) -> bool:
        return bool(self.signals.received)

    @property
    def logger_step(self) -> int:
        return self.fit_loop.progress.batches_that_stepped
