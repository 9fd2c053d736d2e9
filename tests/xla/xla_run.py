"""A training on an XLA device: as a program, ``xla_run.py DIRECTORY PLUGIN STEP``, it kills itself after that step."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch_xla.core.xla_model as xm
from torch.utils.data import DataLoader, TensorDataset

from milepost import LightningModule, Trainer
from milepost.callbacks import Callback, ModelCheckpoint
from milepost.plugins import AsyncCheckpointIO, SnapshotCheckpointIO
from milepost.strategies import SingleDeviceXLAStrategy

PLUGINS: dict[str, Any] = {"xla": lambda: None, "snapshot": SnapshotCheckpointIO, "async": AsyncCheckpointIO}


class Net(LightningModule):
    """Dropout draws on the device; the two ends share their weights, batch norm has buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Linear(8, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.last = torch.nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        hidden = torch.nn.functional.dropout(self.norm(self.first(batch[0])), 0.5)
        loss = (self.last(hidden) - batch[0]).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class DiesAfter(Callback):
    def __init__(self, batch: int) -> None:
        self.left = batch

    def on_train_batch_end(self, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(directory: Path, plugin: str, *, dies_after: int = 0, ckpt_path: str | None = None, **saves: Any) -> Net:
    """Two epochs of ten batches, two of which make a step; a checkpoint after each step."""
    torch.manual_seed(2)
    xm.set_rng_state(3)
    model = Net()
    trainer = Trainer(
        strategy=SingleDeviceXLAStrategy(checkpoint_io=PLUGINS[plugin]()), max_epochs=2, accumulate_grad_batches=2,
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=directory,
        callbacks=[
            ModelCheckpoint(directory, **({"every_n_train_steps": 1, "save_last": True, **saves})),
            *([DiesAfter(dies_after)] if dies_after else []),
        ],
    )  # fmt: skip
    data = TensorDataset(torch.randn(40, 8, generator=torch.Generator().manual_seed(5)))
    trainer.fit(model, DataLoader(data, batch_size=4, shuffle=True), ckpt_path=ckpt_path)
    assert model.device.type == "xla" and model.last.weight is model.first.weight
    return model


def digest(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.cpu().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    fit(Path(sys.argv[1]), sys.argv[2], dies_after=int(sys.argv[3]))
