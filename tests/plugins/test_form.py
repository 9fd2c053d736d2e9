"""What `load_from_checkpoint` reads: checkpoints of each built-in plugin, by what lies at the path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from milepost import LightningDataModule, LightningModule, Trainer
from milepost.callbacks import ModelCheckpoint
from milepost.errors import CheckpointNotFoundError, UnsafeCheckpointError
from milepost.plugins import AsyncCheckpointIO, CheckpointIO, SnapshotCheckpointIO, TorchCheckpointIO
from milepost.plugins.io.safetensors_io import SafetensorsCheckpointIO


class Line(LightningModule):
    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(4, width)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Data(LightningDataModule):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=self.hparams["size"])


def trainer(place: Path, io: CheckpointIO) -> Trainer:
    return Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False, plugins=io,
        callbacks=[ModelCheckpoint(place, save_last=True)], default_root_dir=place,
    )  # fmt: skip


@pytest.mark.parametrize(
    "io",
    [TorchCheckpointIO, SnapshotCheckpointIO, SafetensorsCheckpointIO, lambda: AsyncCheckpointIO(TorchCheckpointIO())],
)
def test_what_a_built_in_plugin_wrote_is_loaded(io: Any, tmp_path: Path) -> None:
    model = Line(3)
    trainer(tmp_path, io()).fit(model, datamodule=Data(2))
    loaded = Line.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu")
    assert loaded.hparams["width"] == 3 and torch.equal(loaded.net.weight, model.net.weight)
    assert Data.load_from_checkpoint(tmp_path / "last.ckpt").hparams["size"] == 2


def test_what_is_not_there_or_unsafe_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        Line.load_from_checkpoint(tmp_path / "absent.ckpt")
    io = SnapshotCheckpointIO(background=False, allow_pickle=True)
    io.save_checkpoint({"state_dict": {}, "hyper_parameters": {"width": print}}, tmp_path / "unsafe.ckpt")
    with pytest.raises(UnsafeCheckpointError):
        Line.load_from_checkpoint(tmp_path / "unsafe.ckpt")


def test_a_trainer_with_another_plugin_says_that_it_does_not_read_it(tmp_path: Path) -> None:
    trainer(tmp_path, SnapshotCheckpointIO()).fit(Line(), datamodule=Data())
    with pytest.raises(CheckpointNotFoundError, match=r"TorchCheckpointIO reads nothing of this kind.*Snapshot"):
        trainer(tmp_path, TorchCheckpointIO()).fit(Line(), datamodule=Data(), ckpt_path=tmp_path / "last.ckpt")
