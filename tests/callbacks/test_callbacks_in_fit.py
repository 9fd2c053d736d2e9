"""The callbacks under the Trainer itself: a run that is cut and resumed equals one that was not."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

from milepost import Module, Trainer, seed_everything
from milepost.callbacks import (
    BasePredictionWriter,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    Timer,
)
from milepost.loggers import CSVLogger
from milepost.profilers import SimpleProfiler


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = (self.layer(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", (self.layer(batch[0]) - batch[1]).square().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "epoch"}]


def loader(shuffle: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(24, 4, generator=generator), torch.randn(24, 1, generator=generator))
    return DataLoader(data, batch_size=4, shuffle=shuffle)


def fit(folder: Path, callbacks: list[Callback], resume: str | None = None, **options: Any) -> tuple[Trainer, Net]:
    seed_everything(3)
    net = Net()
    settings: dict[str, Any] = {"max_epochs": 4, "logger": False, "accelerator": "cpu", **options}
    trainer = Trainer(
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks, **settings
    )
    trainer.fit(net, loader(shuffle=True), loader(), ckpt_path=resume)
    return trainer, net


def averaged(folder: Path, *, every: int = 0) -> list[Callback]:
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=every or 1)
    return [EMAWeightAveraging(decay=0.8), saver]


def test_both_sets_of_weights_resume_exactly_from_the_middle_of_an_epoch(tmp_path: Path) -> None:
    whole_trainer, whole = fit(tmp_path / "whole", averaged(tmp_path / "whole"), max_epochs=2)
    (cut,) = (tmp_path / "whole").glob("*step=8.ckpt")
    resumed_trainer, resumed = fit(tmp_path / "more", averaged(tmp_path / "more"), str(cut), max_epochs=2)
    assert whole_trainer.global_step == resumed_trainer.global_step == 12
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    ends = []
    for name, trainer in (("a", whole_trainer), ("b", resumed_trainer)):
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt").result()
        ends.append(torch.load(tmp_path / f"{name}.ckpt", weights_only=True))
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert all(torch.equal(ends[0][part][key], ends[1][part][key]) for key in ends[0][part]), part
    weights = "layer.0.weight"
    assert not torch.equal(ends[0]["state_dict"][weights], ends[0]["current_model_state"][weights])


def test_early_stopping_stops_and_counts_over_a_restart(tmp_path: Path) -> None:
    def callbacks(name: str) -> list[Callback]:
        saver = ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1, monitor=None)
        return [EarlyStopping("val", patience=2, min_delta=100.0), saver]

    whole, _ = fit(tmp_path, callbacks("whole"), max_epochs=9)
    assert whole.global_step == 3 * 6  # the first value is the best, two more are borne
    (cut,) = (tmp_path / "whole").glob("*epoch=1.ckpt")
    resumed, _ = fit(tmp_path, callbacks("more"), str(cut), max_epochs=9)
    assert resumed.global_step == whole.global_step
    assert resumed.early_stopping_callback.state_dict() == whole.early_stopping_callback.state_dict()


def test_timer_ends_the_run(tmp_path: Path) -> None:
    now = iter(range(1000))
    trainer, _ = fit(tmp_path, [Timer("00:00:00:04", verbose=False, clock=lambda: float(next(now)))])
    assert 0 < trainer.global_step < 24


def test_accumulation_changes_with_the_epoch(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, [GradientAccumulationScheduler({0: 1, 1: 3})], max_epochs=2)
    assert trainer.global_step == 6 + 2


def test_metrics_learning_rates_and_times_are_written(tmp_path: Path) -> None:
    logger, profiler = CSVLogger(tmp_path), SimpleProfiler()
    fit(tmp_path, [LearningRateMonitor("epoch")], logger=logger, profiler=profiler, log_every_n_steps=2, max_epochs=2)
    with logger.metrics_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len([r for r in rows if r["loss"]]) == 6 and len([r for r in rows if r["val"]]) == 2
    assert [float(r["lr-Adam"]) for r in rows if r["lr-Adam"]] == [0.05, 0.05 * 0.1]
    assert len(profiler.recorded_durations["run_training_batch"]) == 12


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches: list[torch.Tensor] = []
        self.epoch: list[torch.Tensor] = []

    def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, *rest: Any) -> None:
        self.batches.append(prediction)

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.epoch = list(predictions)


def test_predictions_are_handed_over(tmp_path: Path) -> None:
    writer = Writer()
    trainer, net = fit(tmp_path, [writer], max_epochs=1)
    trainer.predict(net, loader())
    assert torch.equal(torch.cat(writer.batches), torch.cat(writer.epoch)) and len(writer.epoch) == 6


class Renamed(Net):
    """A later version of the module: its layer has another name, and old checkpoints are translated."""

    def __init__(self) -> None:
        super().__init__()
        self.body = self.layer
        del self.layer

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", (self.body(batch[0]) - batch[1]).square().mean())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key.replace("layer.", "body."): value for key, value in state.items()}


def test_a_migrating_module_gets_both_sets_of_weights(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, averaged(tmp_path), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt").result()
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    net = Renamed()
    again = Trainer(
        max_epochs=1, logger=False, accelerator="cpu", callbacks=averaged(tmp_path / "again"),
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    again.fit(net, loader(shuffle=True), ckpt_path=str(tmp_path / "end.ckpt"))
    again.save_checkpoint(tmp_path / "again.ckpt").result()
    loaded = torch.load(tmp_path / "again.ckpt", weights_only=True)
    for part in ("state_dict", "current_model_state"):
        for key, value in saved[part].items():
            assert torch.equal(loaded[part][key.replace("layer.", "body.")], value), (part, key)


def test_the_progress_line_follows_a_run(tmp_path: Path) -> None:
    out = io.StringIO()
    bar = RichProgressBar(console=Console(file=out, force_terminal=True, width=120))
    fit_with_bar = Trainer(
        max_epochs=2, logger=False, accelerator="cpu", enable_checkpointing=False, callbacks=[bar],
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    fit_with_bar.fit(Net(), loader(), loader())
    text = out.getvalue()
    for words in ("Sanity check ", " 2/2", "\n  Validation ", "Epoch 0/1 ", " 6/6", "loss: "):
        assert words in text, words
