"""Loggers of either library under either Trainer: the same job leaves the same rows and the same events."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import milepost
import milepost.callbacks
import milepost.loggers
from milepost.errors import MisconfigurationException
from milepost.loggers import CSVLogger, TensorBoardLogger

pl = pytest.importorskip("pytorch_lightning")
pytest.importorskip("tensorboard")
pytestmark = [
    pytest.mark.filterwarnings(text)
    for text in [
        "ignore:.*does not have many workers",
        "ignore:.*isinstance.treespec, LeafSpec",
        "ignore:GPU available",
        "ignore::DeprecationWarning",
    ]
]


def fit(side: Any, logger: Any, folder: Path, **options: Any) -> Any:
    class Net(side.LightningModule):  # type: ignore[misc]
        def __init__(self, lr: float = 0.1, layers: tuple[int, ...] = (4, 1)) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(4, 1)
            self.example_input_array = torch.ones(1, 4)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.layer(inputs)
            return output

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self(batch[0]).square().mean()
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self(batch[0]).sum(), on_step=True, on_epoch=True)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])

    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.arange(40.0).reshape(10, 4) / 40), batch_size=2)
    trainer = side.Trainer(
        max_epochs=2, logger=logger, accelerator="cpu", default_root_dir=folder, log_every_n_steps=2,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[side.callbacks.LearningRateMonitor("step")],
        **options,
    )  # fmt: skip
    trainer.fit(Net(), data, data)
    return trainer


def rows(logger: Any) -> list[dict[str, float]]:
    with Path(logger.log_dir, "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def events(logger: Any) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(logger.log_dir))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_rows_are_those_of_lightning(tmp_path: Path) -> None:
    ours, theirs, crossed = CSVLogger(tmp_path / "a"), pl.loggers.CSVLogger(tmp_path / "b"), tmp_path / "c"
    fit(milepost, ours, tmp_path)
    fit(pl, theirs, tmp_path)
    borrowed = pl.loggers.CSVLogger(crossed)
    trainer = fit(milepost, borrowed, tmp_path)
    assert rows(borrowed) == rows(theirs)
    assert rows(ours) == rows(theirs)
    assert trainer.log_dir == borrowed.log_dir
    assert Path(borrowed.log_dir, "hparams.yaml").exists() and list(Path(borrowed.log_dir).glob("checkpoints/*.ckpt"))


def test_events_are_those_of_lightning(tmp_path: Path) -> None:
    ours, theirs = (side.loggers.TensorBoardLogger(tmp_path / side.__name__) for side in (milepost, pl))
    borrowed = pl.loggers.TensorBoardLogger(tmp_path / "c")
    fit(milepost, ours, tmp_path)
    fit(pl, theirs, tmp_path)
    fit(milepost, borrowed, tmp_path)
    assert events(ours) == events(borrowed) == events(theirs)
    assert events(ours)["hp_metric"] == [(0, -1.0)]


def test_the_dashboard_gets_the_hyperparameters_of_lightning(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def content(side: Any) -> dict[str, bytes]:
        logger = side.loggers.TensorBoardLogger(tmp_path / side.__name__, sub_dir="tb")
        logger.log_hyperparams({"lr": 0.1, "net": {"layers": [1, 2], "bias": True}}, {"hp/best": 3.0})
        logger.finalize("success")
        found = EventAccumulator(str(logger.log_dir))
        found.Reload()
        assert found.Scalars("hp/best")[0].value == 3.0
        return {k: v for k, v in found.summary_metadata.items() if k.startswith("_hparams_")}  # type: ignore[misc]

    ours, theirs = content(milepost), content(pl)
    assert set(ours) == set(theirs)
    key = "_hparams_/session_start_info"
    assert _params(ours[key]) == _params(theirs[key])
    assert (tmp_path / "milepost" / "lightning_logs" / "version_0" / "tb" / "hparams.yaml").exists()


def _params(metadata: Any) -> Any:
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
    return {name: str(value) for name, value in content.session_start_info.hparams.items()}


def test_the_graph_is_drawn_and_training_stays_the_same(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drawn, plain = TensorBoardLogger(tmp_path / "a", log_graph=True), TensorBoardLogger(tmp_path / "b")
    with_graph, without = fit(milepost, drawn, tmp_path), fit(milepost, plain, tmp_path)
    assert torch.equal(with_graph.lightning_module.layer.weight, without.lightning_module.layer.weight)
    for logger, there in ((drawn, True), (plain, False)):
        found = EventAccumulator(logger.log_dir)
        found.Reload()
        assert found.Tags()["graph"] is there


def test_a_logger_object_of_any_kind_gets_the_calls(tmp_path: Path) -> None:
    """As that of Weights & Biases: a remote one, without a folder."""
    calls: list[str] = []

    class Remote(pl.loggers.logger.Logger):  # type: ignore[misc]
        name, version = "remote", "abc"

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            calls.append(f"metrics {step}")

        def log_hyperparams(self, params: Any) -> None:
            calls.append(f"hyperparams {sorted(params)}")

        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            calls.append(f"saved {Path(checkpoint_callback.best_model_path).name}")

        def finalize(self, status: str) -> None:
            calls.append(f"finalize {status}")

    trainer = fit(milepost, Remote(), tmp_path)
    assert calls[0] == "hyperparams ['layers', 'lr']" and calls[-1] == "finalize success"
    assert {"metrics 1", "saved epoch=1-step=10.ckpt"} <= set(calls)
    assert str(tmp_path) in trainer.checkpoint_callback.dirpath


def test_two_values_of_one_hyperparameter_are_refused(tmp_path: Path) -> None:
    class Data(milepost.DataModule):
        def __init__(self, lr: float) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(torch.ones(4, 4)))

    class Net(milepost.Module):
        def __init__(self, lr: float) -> None:
            super().__init__()
            self.save_hyperparameters()

        def configure_optimizers(self) -> None:
            return None

    trainer = milepost.Trainer(logger=CSVLogger(tmp_path), accelerator="cpu", enable_checkpointing=False,
                               enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    with pytest.raises(MisconfigurationException, match="'lr'"):
        trainer.fit(Net(0.1), datamodule=Data(0.2))
