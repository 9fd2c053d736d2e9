"""A checkpoint written when an error interrupted a batch: exact where nothing was changed, else it says what was."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_exact_resume import Net, Points, Rows, everything
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from milepost import Trainer
from milepost.callbacks import Callback, OnExceptionCheckpoint


class Interrupted(Exception):
    pass


class Breaking(Net):
    """Draws from every generator and logs, then breaks at one place of its tenth batch, which lies in epoch 1."""

    place = ""
    norm = False

    def __init__(self) -> None:
        super().__init__()
        self.net[1] = nn.BatchNorm1d(16) if self.norm else nn.LayerNorm(16)
        self.batches = 0

    def reach(self, place: str) -> None:
        if place == self.place and self.batches == 10:
            raise Interrupted(place)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not self.training:
            return batch
        self.batches += 1
        noise = torch.rand(()) + random.random() + np.random.rand()
        self.reach("transfer")
        return [batch[0] + noise, *batch[1:]]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.reach("batch start")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("drawn", torch.rand(()), on_step=True, on_epoch=True)
        self.net(batch[0])
        self.reach("forward")
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        self.reach("backward")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.reach("before step")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.reach("batch end")


class BreakingNorm(Breaking):
    norm = True


class BreakingMetered(Breaking):
    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.mean.update(batch_idx)
        return super().training_step(batch, batch_idx)


def fit(
    folder: Path, build: type[Breaking], place: str, resume: Path | None = None, accumulate: int = 1
) -> tuple[Trainer, Breaking]:
    torch.manual_seed(0 if resume is None else 60)
    random.seed(0 if resume is None else 60)
    np.random.seed(0 if resume is None else 60)
    net = build()
    net.place = place
    trainer = Trainer(
        max_epochs=3, accumulate_grad_batches=accumulate, logger=Rows(), log_every_n_steps=1, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[OnExceptionCheckpoint(folder)], num_sanity_val_steps=0,
    )  # fmt: skip
    data = DataLoader(Points(True), batch_size=3, shuffle=True)
    validation = DataLoader(Points(False), batch_size=8)
    trainer.fit(net, data, validation, ckpt_path=None if resume is None else str(resume))
    return trainer, net


def crash(folder: Path, build: type[Breaking], place: str, accumulate: int = 1) -> Path:
    with pytest.raises(Interrupted, match=place):
        fit(folder, build, place, accumulate=accumulate)
    return folder / "on_exception.ckpt"


def assert_equal(resumed: tuple[Trainer, Breaking], unbroken: tuple[Trainer, Breaking]) -> None:
    (trainer, net), (other, whole) = resumed, unbroken
    assert net.log_lines == whole.log_lines[-len(net.log_lines) :]
    assert trainer.logger.rows == other.logger.rows[-len(trainer.logger.rows) :]
    for one, two in zip(everything(trainer, net), everything(other, whole), strict=True):
        assert torch.equal(one, two)


PLACES = [(place, 1) for place in ("transfer", "batch start", "forward", "backward", "before step", "batch end")]
PLACES += [(place, 3) for place in ("transfer", "forward", "batch end")]


@pytest.mark.parametrize(("place", "accumulate"), PLACES)
def test_exact_while_nothing_was_changed(tmp_path: Path, place: str, accumulate: int) -> None:
    """Batch 10 is the second of three that accumulate; alone, its gradients are thrown away with it."""
    path = crash(tmp_path, Breaking, place, accumulate)
    unbroken = fit(tmp_path / "whole", Breaking, "", accumulate=accumulate)
    resumed = fit(tmp_path, Breaking, "", path, accumulate)
    assert resumed[1].log_lines[0][:2] == ((1, 2) if place == "batch end" else (1, 1))
    assert_equal(resumed, unbroken)


CHANGED: dict[str, tuple[type[Breaking], str, int, str]] = {
    "buffers": (BreakingNorm, "forward", 1, r"changed buffers of the model \(BatchNorm's statistics are such\)\."),
    "metrics": (BreakingMetered, "forward", 1, r"changed what metric objects have accumulated\."),
    "gradients": (Breaking, "backward", 3, r"changed the gradients accumulated so far\."),
}


@pytest.mark.parametrize("case", CHANGED)
def test_says_what_was_changed(tmp_path: Path, case: str) -> None:
    build, place, accumulate, message = CHANGED[case]
    path = crash(tmp_path, build, place, accumulate)
    with pytest.warns(UserWarning, match=message) as told:
        _, net = fit(tmp_path, build, "", path, accumulate)
    assert len(told) == 1
    assert net.log_lines[0][:2] == (1, 1), "the batch is trained on again"


def test_an_optimizer_that_broke_says_so(tmp_path: Path) -> None:
    class BreakingStep(torch.optim.SGD):
        steps = 0

        def step(self, closure: Callable[[], float] | None = None) -> Any:
            result = super().step(closure)
            self.steps += 1
            if self.steps == 10 and self.param_groups[0]["breaks"]:
                raise Interrupted("step")
            return result

    class Stepping(Breaking):
        def configure_optimizers(self) -> Any:
            optimizer = BreakingStep(self.parameters(), lr=0.01)
            optimizer.param_groups[0]["breaks"] = self.place == "step"
            return optimizer

    path = crash(tmp_path, Stepping, "step")
    with pytest.warns(UserWarning, match="weights and optimizer state"), pytest.raises(Interrupted):
        fit(tmp_path, Stepping, "", path)  # the group of the file still breaks


def test_a_save_that_a_callback_makes_inside_a_batch_says_so(tmp_path: Path) -> None:
    """Random state from before each batch is kept only where an error would lead to a save: it costs time."""

    class InBatch(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            if pl_module.batches == 10:
                trainer.save_checkpoint(tmp_path / "in.ckpt").result()

    net = Breaking()
    trainer = Trainer(
        max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[InBatch()],
        enable_checkpointing=False,
    )  # fmt: skip
    data = DataLoader(Points(True), batch_size=3)
    trainer.fit(net, data, DataLoader(Points(False), batch_size=8))
    with pytest.warns(UserWarning, match=r"changed random state\."):
        fit(tmp_path, Breaking, "", tmp_path / "in.ckpt")
