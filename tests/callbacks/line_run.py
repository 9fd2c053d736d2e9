"""A small real run for checkpointer tests: one layer, known validation values, real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from milepost import Module, Trainer


class Line(Module):
    """Fits a line; logs ``train_loss`` each step and, in each validation, ``val`` from a given list."""

    def __init__(self, values: list[float] | None = None, stop_at: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.values = list(values or [])
        self.validations = 0
        self.stop_at = stop_at

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.stop_at is not None and self.trainer.global_step == self.stop_at:
            raise RuntimeError("stopped by the test")
        loss = self.layer(batch[0]).pow(2).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/x", self.layer(batch[0]).pow(2).mean())

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        value = self.values[self.validations] if self.validations < len(self.values) else 1.0
        self.log("val", value)
        self.validations += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader() -> DataLoader[Any]:
    """Four batches of two: four optimizer steps an epoch."""
    return DataLoader(TensorDataset(torch.arange(16.0).reshape(8, 2) / 16), batch_size=2)


def fit_line(
    root: Path,
    *callbacks: Any,
    values: list[float] | None = None,
    stop_at: int | None = None,
    ckpt_path: str | None = None,
    validate: bool = True,
    **options: Any,
) -> Trainer:
    """Fit a `Line` for one epoch with `callbacks`; returns the trainer."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "max_epochs": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": root,
        **options,
    }
    torch.manual_seed(0)
    trainer = Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(Line(values, stop_at), loader(), loader() if validate else None, ckpt_path=ckpt_path)
    return trainer


def names(directory: str | Path) -> set[str]:
    """What lies in `directory`, the index apart."""
    return {entry.name for entry in Path(directory).iterdir()} - {"index.json"}


def read(path: str | Path) -> dict[str, Any]:
    """The checkpoint at `path`, as torch alone reads it."""
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded
