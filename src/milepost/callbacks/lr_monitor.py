"""Log the learning rates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from milepost.callbacks.callback import Callback
from milepost.errors import MisconfigurationException

if TYPE_CHECKING:
    from milepost.trainer.module import Module
    from milepost.trainer.trainer import Trainer


class LearningRateMonitor(Callback):
    """Logs each optimizer's learning rate as ``lr-Adam``, further ones of that kind as ``lr-Adam-1`` and so on.

    Several parameter groups are told apart as ``lr-Adam/pg1`` or, where a group has a ``name``, by it. The
    ``name`` of a scheduler (in the lr_scheduler dict) takes the place of ``lr-Adam``.

    Args:
        logging_interval: ``"step"``, ``"epoch"``, or None for each scheduler's own interval.
        log_momentum: also log ``NAME-momentum`` (the first beta for Adam and its like).
        log_weight_decay: also log ``NAME-weight_decay``.
    """

    def __init__(
        self, logging_interval: str | None = None, log_momentum: bool = False, log_weight_decay: bool = False
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise MisconfigurationException(f"logging_interval is {logging_interval!r}; give 'step', 'epoch' or None")
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        if not trainer.loggers:
            raise MisconfigurationException("LearningRateMonitor has nowhere to log to: give Trainer(logger=...)")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        step = trainer.fit_loop.progress.batches_that_stepped
        every = trainer.log_every_n_steps  # 0: the user wants no step logged
        if self.logging_interval != "epoch" and every and (step + 1) % every == 0:
            self._log(trainer, "step")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self.logging_interval != "step":
            self._log(trainer, "epoch")

    def _log(self, trainer: Trainer, interval: str) -> None:
        values: dict[str, float] = {}
        for name, optimizer, own_interval in _named_optimizers(trainer):
            if self.logging_interval is not None or own_interval in (None, interval):
                values.update(self._values(name, optimizer))
        if not values:
            return
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.fit_loop.progress.batches_that_stepped)

    def _values(self, name: str, optimizer: Optimizer) -> Iterator[tuple[str, float]]:
        groups = optimizer.param_groups
        for index, group in enumerate(groups, start=1):
            label = f"{name}/{group.get('name', f'pg{index}')}" if len(groups) > 1 else name
            yield label, float(group["lr"])
            if self.log_momentum:
                yield f"{label}-momentum", float(group["betas"][0] if "betas" in group else group.get("momentum", 0))
            if self.log_weight_decay:
                yield f"{label}-weight_decay", float(group.get("weight_decay", 0))


def _named_optimizers(trainer: Trainer) -> Iterator[tuple[str, Optimizer, str | None]]:
    """Each optimizer with its name and the interval of its scheduler, those without a scheduler last."""
    seen: dict[str, int] = {}
    scheduled = []
    for config in trainer.lr_scheduler_configs:
        optimizer = config.scheduler.optimizer
        scheduled.append(optimizer)
        yield _unique(config.name or f"lr-{type(optimizer).__name__}", seen), optimizer, config.interval
    for optimizer in trainer.optimizers:
        if not any(optimizer is other for other in scheduled):
            yield _unique(f"lr-{type(optimizer).__name__}", seen), optimizer, None


def _unique(name: str, seen: dict[str, int]) -> str:
    count = seen.get(name, 0)
    seen[name] = count + 1
    return f"{name}-{count}" if count else name
