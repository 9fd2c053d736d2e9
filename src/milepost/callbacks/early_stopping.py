"""Stop when a metric no longer improves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from milepost import _distributed
from milepost.callbacks.callback import Callback
from milepost.errors import MisconfigurationException

if TYPE_CHECKING:
    from milepost.trainer.module import Module
    from milepost.trainer.trainer import Trainer


class EarlyStopping(Callback):
    """Sets ``trainer.should_stop`` once `monitor` has not improved for `patience` checks.

    Args:
        monitor: name of a logged metric.
        min_delta: a change counts as an improvement only if it is larger than this, in the metric's unit.
        patience: checks without improvement that are borne; the run stops at that one.
        verbose: print each improvement and the reason to stop.
        mode: ``"min"`` or ``"max"``, whichever is better.
        strict: raise when `monitor` is not there, rather than warn by doing nothing.
        check_finite: stop when the metric is NaN or infinite.
        stopping_threshold: stop as soon as the metric is better than this.
        divergence_threshold: stop as soon as the metric is worse than this.
        check_on_train_epoch_end: check when a training epoch ends; False: when validation ends; None: when validation
            ends, unless validation runs exactly once per epoch, at its end.
        log_rank_zero_only: print on rank 0 only.

    Attributes:
        wait_count: checks since the last improvement.
        stopped_epoch: epoch in which it stopped the run, 0 if it has not.
        best_score: the best value so far, a scalar tensor.
        stopping_reason_message: why it stopped the run, or None.
    """

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:
        if mode not in ("min", "max"):
            raise MisconfigurationException(f"mode is {mode!r}; give 'min' or 'max'")
        self.monitor = monitor
        self.min_delta = abs(min_delta)
        self.patience = patience
        self.verbose = verbose
        self.mode = mode
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.log_rank_zero_only = log_rank_zero_only
        self._check_on_train_epoch_end = check_on_train_epoch_end
        self.wait_count = 0
        self.stopped_epoch = 0
        self.best_score = torch.tensor(math.inf if mode == "min" else -math.inf)
        self.stopping_reason_message: str | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def state_dict(self) -> dict[str, Any]:
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "patience": self.patience,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict["stopped_epoch"]
        self.best_score = torch.as_tensor(state_dict["best_score"])
        self.patience = state_dict["patience"]

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if self._check_on_train_epoch_end is None:
            # Validation once per epoch and at its end has logged its metrics when on_train_epoch_end comes, and then
            # metrics of the training epoch can be monitored too.
            self._check_on_train_epoch_end = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._check_on_train_epoch_end:
            self._check(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        if not self._check_on_train_epoch_end:
            self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:
            return
        value = trainer.callback_metrics.get(self.monitor)
        if self.strict and any(_distributed.all_gather_objects(value is None)):
            where = "" if value is None else " on another rank"
            raise MisconfigurationException(
                f"EarlyStopping monitors {self.monitor!r}, which is not logged{where}. Logged are "
                f"{sorted(trainer.callback_metrics)}: log it with self.log, or give strict=False."
            )
        reason = improvement = None
        if value is not None:
            reason, improvement = self._judge(torch.as_tensor(value).detach().squeeze())
        # A rank that stops alone would leave the others waiting in the next collective.
        reason = _any_rank(reason)
        if reason is not None:
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason_message = reason
            trainer.should_stop = True
        message = reason or improvement
        if message and self.verbose and (trainer.is_global_zero or not self.log_rank_zero_only):
            print(message)

    def _judge(self, value: torch.Tensor) -> tuple[str | None, str | None]:
        """Take in one value. Returns the reason to stop, if any, and what to say of an improvement."""
        name, number = self.monitor, value.item()
        if self.check_finite and not math.isfinite(number):
            return f"{name} = {number} is not finite. The last best was {self.best_score.item():.3f}. Stopping.", None
        if self.stopping_threshold is not None and self._better(number, self.stopping_threshold):
            return f"{name} = {number} reached the threshold {self.stopping_threshold}. Stopping.", None
        if self.divergence_threshold is not None and self._better(self.divergence_threshold, number):
            return f"{name} = {number} is worse than the limit {self.divergence_threshold}. Stopping.", None
        best = self.best_score.item()
        if self._better(number, best, self.min_delta):
            self.best_score, self.wait_count = value.clone(), 0
            return None, f"{name} improved from {best:.3f} to {number:.3f}."
        self.wait_count += 1
        if self.wait_count >= self.patience:
            return f"{name} did not improve for {self.wait_count} checks. Best was {best:.3f}. Stopping.", None
        return None, None

    def _better(self, value: float, than: float, margin: float = 0.0) -> bool:
        return value + margin < than if self.mode == "min" else value - margin > than


def _any_rank(reason: str | None) -> str | None:
    """The reason of the lowest rank that has one, the same on all ranks."""
    return next((r for r in _distributed.all_gather_objects(reason) if r is not None), None)
