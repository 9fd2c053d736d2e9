"""The versions that torch keeps beside a state dict reach the file, and the modules that ask for them on load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from milepost import LightningModule, Trainer
from milepost.plugins import AsyncCheckpointIO

ASKED: list[int | None] = []


class Versioned(torch.nn.Linear):
    _version = 3

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *others: Any) -> None:
        ASKED.append(local_metadata.get("version"))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


class Net(LightningModule):
    def __init__(self, compiled: bool = False) -> None:
        super().__init__()
        layer: Any = Versioned(4, 1)
        self.net = torch.compile(layer, backend="eager") if compiled else layer

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Theirs(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Versioned(4, 1)


def fit(epochs: int, compiled: bool, ckpt_path: Path | None = None, **options: Any) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(Net(compiled), DataLoader(TensorDataset(torch.ones(4, 4)), batch_size=4), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("resumed", ["plain", "compiled"])
@pytest.mark.parametrize("saved", ["plain", "compiled", "in the background"])
def test_a_module_is_asked_to_load_its_own_version(tmp_path: Path, saved: str, resumed: str) -> None:
    path = tmp_path / "a.ckpt"
    options = {"plugins": AsyncCheckpointIO()} if saved == "in the background" else {}
    fit(1, saved == "compiled", **options).save_checkpoint(path).result()
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert weights._metadata["net"]["version"] == 3 and list(weights) == ["net.weight", "net.bias"]
    ASKED.clear()
    fit(2, resumed == "compiled", path)
    assert ASKED == [3]
    ASKED.clear()
    Net.load_from_checkpoint(path, compiled=resumed == "compiled")
    Theirs.load_from_checkpoint(path, weights_only=True)
    assert ASKED == [3, 3]
