"""One process of test_resume_versions: fits under a logger that numbers its versions; prints where it began."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from milepost import Module, Trainer
from milepost.callbacks import Callback
from milepost.loggers import CSVLogger


class Tiny(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Note(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        print("began at", trainer.global_step)


def fit(root: str, ckpt_path: str, epochs: int, version: str | None = None) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", default_root_dir=root, max_epochs=epochs, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Note()], logger=CSVLogger(root, version=version),
    )  # fmt: skip
    trainer.fit(Tiny(), DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2), ckpt_path=ckpt_path)
    return trainer


if __name__ == "__main__":
    warnings.showwarning = lambda message, *_: print("warned:", message)
    print("ended in", fit(sys.argv[1], sys.argv[2], int(sys.argv[3])).log_dir)
