"""What Lightning users import from `utilities`, used as its pages use it."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from milepost import LightningModule, Trainer
from milepost.loggers.logger import Logger, rank_zero_experiment
from milepost.utilities import CombinedLoader, grad_norm, move_data_to_device, rank_zero_info, rank_zero_only
from milepost.utilities.rank_zero import rank_zero_deprecation, rank_zero_warn
from milepost.utilities.seed import isolate_rng
from milepost.utilities.types import STEP_OUTPUT, OptimizerLRScheduler


class MyLogger(Logger):
    """As Lightning's page on loggers shows one."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        return "mine"

    @property
    def version(self) -> str:
        return "0.1"

    @property
    @rank_zero_experiment
    def experiment(self) -> list[dict[str, float]]:
        return self.seen

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.experiment.append(dict(metrics))


class Annotated(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        loss: torch.Tensor = self.layer(batch["a"][0] + batch["b"][0]).square().mean()
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict(grad_norm(self.layer, norm_type=2))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_program_that_uses_them_trains(tmp_path: Any) -> None:
    def data(n: int) -> Any:
        return DataLoader(TensorDataset(torch.ones(n, 2)), batch_size=2)

    logger = MyLogger()
    trainer = Trainer(
        max_epochs=1, logger=logger, log_every_n_steps=1, default_root_dir=tmp_path, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Annotated(), CombinedLoader({"a": data(4), "b": data(8)}, "max_size_cycle"))
    names = {"grad_2.0_norm/weight", "grad_2.0_norm/bias", "grad_2.0_norm_total"}
    assert trainer.global_step == 4 and all(names <= row.keys() for row in logger.seen) and len(logger.seen) == 4


@pytest.mark.parametrize("norm_type", [1, 2, 3.0, "inf"])
def test_norms_are_lightnings(norm_type: Any) -> None:
    theirs = pytest.importorskip("pytorch_lightning.utilities").grad_norm
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    assert grad_norm(net, norm_type) == {}
    net[0](torch.randn(4, 3)).sum().backward()
    assert grad_norm(net, norm_type, "_") == theirs(net, norm_type, "_")
    with pytest.raises(ValueError, match="norm_type=0"):
        grad_norm(net, 0)


def test_what_rank_zero_does_points_at_its_caller(caplog: pytest.LogCaptureFixture) -> None:
    assert rank_zero_only.rank == 0
    assert rank_zero_only(lambda: 3)() == 3
    with pytest.warns(UserWarning, match="careful") as warned:
        rank_zero_warn("careful")
    with pytest.warns(DeprecationWarning, match="going") as going:
        rank_zero_deprecation("going")
    assert [w[0].filename for w in (warned, going)] == [__file__, __file__]
    with caplog.at_level(logging.INFO):
        rank_zero_info("so far %d", 7)
    assert [(r.message, r.pathname) for r in caplog.records] == [("so far 7", __file__)]


def test_other_ranks_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milepost._distributed.rank", lambda: 1)
    called: list[int] = []
    assert rank_zero_only(lambda: called.append(1), default=5)() == 5 and not called
    logger = MyLogger()
    logger.experiment.append({"a": 1.0})  # of nothing
    assert logger.seen == []


def test_drawing_inside_leaves_no_trace() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with isolate_rng(include_cuda=False):
        torch.rand(9), random.random()
    assert torch.equal(torch.rand(2), expected)


def test_a_batch_is_moved() -> None:
    moved = move_data_to_device({"x": [torch.ones(2)], "name": "n"}, "meta")
    assert moved["x"][0].device.type == "meta" and moved["name"] == "n"
