"""LearningRateMonitor: names, values and moments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from milepost.callbacks import LearningRateMonitor
from milepost.errors import MisconfigurationException
from milepost.loggers import CSVLogger


class Recorder(CSVLogger):
    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))


def trainer(optimizers: list[Any], configs: list[Any] | None = None) -> Any:
    return SimpleNamespace(
        optimizers=optimizers,
        lr_scheduler_configs=configs or [],
        loggers=[Recorder()],
        callback_metrics={},
        log_every_n_steps=2,
        fit_loop=SimpleNamespace(progress=SimpleNamespace(batches_that_stepped=1)),
    )


def sgd(**options: Any) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], **{"lr": 0.5, **options})


MODULE: Any = None


def test_names_and_values() -> None:
    groups = torch.optim.Adam(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1},
         {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.2, "name": "head"}]
    )  # fmt: skip
    t = trainer([sgd(momentum=0.25, weight_decay=0.125), sgd(), groups])
    LearningRateMonitor(log_momentum=True, log_weight_decay=True).on_train_batch_start(t, MODULE, None, 0)
    ((step, values),) = t.loggers[0].rows
    assert step == 1
    assert {k: v.item() for k, v in t.callback_metrics.items()} == pytest.approx(values)
    assert (values["lr-SGD"], values["lr-SGD-momentum"], values["lr-SGD-weight_decay"]) == (0.5, 0.25, 0.125)
    assert (values["lr-SGD-1"], values["lr-Adam/pg1"], values["lr-Adam/head"]) == (0.5, 0.1, 0.2)
    assert values["lr-Adam/pg1-momentum"] == 0.9


def test_only_every_n_steps() -> None:
    t = trainer([sgd()])
    t.fit_loop.progress.batches_that_stepped = 2
    LearningRateMonitor("step").on_train_batch_start(t, MODULE, None, 0)
    assert t.loggers[0].rows == []


@pytest.mark.parametrize(("interval", "logged"), [(None, "e"), ("epoch", "se"), ("step", "")])
def test_intervals_at_an_epoch_start(interval: str | None, logged: str) -> None:
    configs = [
        SimpleNamespace(scheduler=torch.optim.lr_scheduler.ConstantLR(sgd()), interval=kind, name=kind[0])
        for kind in ("step", "epoch")
    ]
    t = trainer([c.scheduler.optimizer for c in configs], configs)
    LearningRateMonitor(interval).on_train_epoch_start(t, MODULE)
    assert "".join(name for _, row in t.loggers[0].rows for name in row) == logged


def test_refusals() -> None:
    with pytest.raises(MisconfigurationException, match="batch"):
        LearningRateMonitor("batch")
    with pytest.raises(MisconfigurationException, match="logger"):
        LearningRateMonitor().on_train_start(SimpleNamespace(loggers=[]), MODULE)
