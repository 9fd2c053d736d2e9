"""Each kind of state that a run keeps beside its weights, after a kill inside an epoch and a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_exact_resume import Killed, Net, Points, Rows, SaveAndDie, everything
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanMetric, MeanSquaredError, MetricCollection, MinMaxMetric, SumMetric
from torchmetrics.classification import BinaryAccuracy, BinaryPrecision, BinaryRecall
from torchmetrics.wrappers import MetricTracker, Running

from milepost import LightningModule, Trainer
from milepost.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint


class Metered(Net):
    """Metric objects of every build: logged, kept by hand, with list states, in a collection, in wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.all = MeanMetric(), CatMetric()
        self.by_hand = MeanSquaredError()
        self.group = MetricCollection([BinaryPrecision(), BinaryRecall(), BinaryAccuracy()], prefix="in_")
        self.extremes = MinMaxMetric(SumMetric())
        self.window = Running(SumMetric(), window=3)
        self.tracker = MetricTracker(MeanMetric(), maximize=False)
        self.val_mean = MeanMetric()

    def on_train_epoch_start(self) -> None:
        self.tracker.increment()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        x, y, _ = batch
        self.mean.update(loss.detach(), weight=batch_idx + 1)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.all.update(x[:, 0])
        self.group(torch.sigmoid(x[:, 0]), (y[:, 0] > 0).int())
        self.log_dict(self.group, on_step=False, on_epoch=True)
        self.by_hand.update(x[:, 0], y[:, 0])
        self.window.update(loss.detach())
        self.extremes.update(loss.detach())
        self.extremes.compute()
        self.tracker.update(loss.detach())
        for reduction in ("min", "max", "sum"):
            self.log(f"loss_{reduction}", loss, reduce_fx=reduction, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.val_mean.update(batch[0].sum())
        self.log("val_mean", self.val_mean)

    def on_train_epoch_end(self) -> None:
        extremes = self.extremes.compute()
        values = {"max": extremes["max"], "window": self.window.compute(), "by_hand": self.by_hand.compute()}
        self.log_dict({**values, "all": self.all.compute().std(), "tracked": self.tracker.best_metric()})
        self.all.reset()
        self.by_hand.reset()


class Counting(Net):
    """A buffer that its state dict leaves out, but training uses; beside one that never changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(10), persistent=False)
        self.register_buffer("replaced", torch.zeros(()), persistent=False)
        self.register_buffer("table", torch.arange(5000.0), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.running.mul_(0.9).add_(batch[0].mean(0))
        self.replaced = self.replaced + 1
        return super().training_step((batch[0] - self.running + self.replaced / 100, *batch[1:]), batch_idx)


class Adversaries(LightningModule):
    """Two optimizers stepped by hand, each accumulating over its own number of batches, with schedulers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.other = nn.Linear(10, 10), nn.Sequential(nn.Dropout(0.2), nn.Linear(10, 1))
        self.log_lines: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y, index = batch
        for number, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            loss = nn.functional.mse_loss(self.other(self.one(x)), y if number else -y)
            self.manual_backward(loss)
            if (batch_idx + 1) % (number + 2) == 0:
                optimizer.step()
                optimizer.zero_grad()
                self.lr_schedulers()[number].step()
            self.untoggle_optimizer(optimizer)
            self.log(f"loss_{number}", loss, on_step=True, on_epoch=True)
        self.log_lines.append((self.current_epoch, batch_idx, tuple(index.tolist()), float(loss.detach())))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.other(self.one(batch[0])).mean())

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.AdamW(self.one.parameters(), lr=0.01),
            torch.optim.SGD(self.other.parameters(), lr=0.1, momentum=0.9),
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.97) for o in optimizers]


class Scaled(Net):
    """Trains in fp16 with a scaler that grows often; one batch in each epoch overflows and its step is skipped."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 4 else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def averaging(folder: Path) -> list[Any]:
    return [EMAWeightAveraging(decay=0.8)]


def watching(folder: Path) -> list[Any]:
    keep = ModelCheckpoint(folder / "kept", monitor="val", save_top_k=2, every_n_train_steps=2, save_last=True)
    return [
        EarlyStopping("val", patience=3),
        EarlyStopping("loss_epoch", patience=50, check_on_train_epoch_end=True),
        keep,
    ]


def none(folder: Path) -> list[Any]:
    return []


CASES: dict[str, tuple[type[Any], Any, dict[str, Any]]] = {
    "metric objects": (Metered, none, {"accumulate_grad_batches": 3}),
    "buffers": (Counting, none, {"accumulate_grad_batches": 3}),
    "several optimizers": (Adversaries, none, {}),
    "scaler": (Scaled, none, {"precision": "16-mixed", "accumulate_grad_batches": 2}),
    "averaging": (Net, averaging, {"accumulate_grad_batches": 3}),
    "callbacks": (Net, watching, {"accumulate_grad_batches": 3}),
}


def fit(folder: Path, case: str, *callbacks: Any, ckpt_path: str | None = None) -> tuple[Trainer, Any]:
    build, more, options = CASES[case]
    torch.manual_seed(3 if ckpt_path is None else 44)
    net = build()
    trainer = Trainer(
        max_epochs=3, val_check_interval=4, callbacks=[*more(folder), *callbacks], logger=Rows(), log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip
    if trainer.scaler is not None:
        begin = {"scale": 64.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2, "_growth_tracker": 0}
        trainer.scaler.load_state_dict(begin)
    data = DataLoader(Points(True), batch_size=3, shuffle=True)
    trainer.fit(net, data, DataLoader(Points(False), batch_size=8), ckpt_path=ckpt_path)
    return trainer, net


def kept(trainer: Trainer) -> list[Any]:
    """What the callbacks and the scaler have come to, paths of the run's own folder aside."""
    found: list[Any] = [] if trainer.scaler is None else [trainer.scaler.state_dict()]
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping):
            found.append((callback.wait_count, callback.stopped_epoch, float(callback.best_score)))
        if isinstance(callback, ModelCheckpoint) and callback.monitor:
            scores = sorted((Path(path).name, float(score)) for path, score in callback.best_k_models.items())
            found.append((scores, Path(callback.best_model_path).name, Path(callback.last_model_path).name))
    return found


@pytest.mark.parametrize("point", ["batch inside accumulation", "validation", "validation end", "epoch end"])
@pytest.mark.parametrize("case", CASES)
def test_goes_on_with_it(case: str, point: str, tmp_path: Path) -> None:
    path = tmp_path / "killed.ckpt"
    unbroken_trainer, unbroken = fit(tmp_path / "whole", case)
    with pytest.raises(Killed):
        fit(tmp_path / "cut", case, SaveAndDie(point, path))
    trainer, resumed = fit(tmp_path / "cut", case, ckpt_path=str(path))
    count, rows = len(resumed.log_lines), trainer.logger.rows
    assert 0 < count < len(unbroken.log_lines)
    assert resumed.log_lines == unbroken.log_lines[-count:]
    assert rows == unbroken_trainer.logger.rows[-len(rows) :]
    assert kept(trainer) == kept(unbroken_trainer)
    for one, other in zip(everything(trainer, resumed), everything(unbroken_trainer, unbroken), strict=True):
        assert torch.equal(one, other)


def test_only_buffers_that_changed_are_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(tmp_path, "buffers", SaveAndDie("validation end", tmp_path / "a.ckpt"))
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["milepost"]["buffers"]
    assert set(saved) == {"running", "replaced"}


def test_a_metric_that_is_no_attribute_is_told_once(tmp_path: Path) -> None:
    class Hidden(Net):
        def __init__(self) -> None:
            super().__init__()
            self.box = [MeanMetric()]

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.box[0].update(1.0)
            self.log("hidden", self.box[0], on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    trainer = Trainer(
        max_epochs=1, callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)], logger=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    model = Hidden()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.1)  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="'hidden' is no attribute of Hidden") as told:
        trainer.fit(model, DataLoader(Points(False), batch_size=3))
    assert len(told) == 1
