"""Run the digits job in one directory: `python train.py DIRECTORY [--ckpt-path last]`.

Writes `DIRECTORY/log.jsonl` (a line per batch, written before the next batch starts), `DIRECTORY/checkpoints/` and,
at the end, `DIRECTORY/digest.txt`, the SHA-256 of the final weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from model import DigitsClassifier

from milepost import LightningModule, Trainer, seed_everything
from milepost.callbacks import Callback, ModelCheckpoint


class BatchLog(Callback):
    """Appends one JSON line per training batch, in one write, so that a killed process leaves whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        line = {
            "epoch": trainer.current_epoch,
            "batch_idx": batch_idx,
            "global_step": trainer.global_step,
            "ids": batch[2].tolist(),
            "loss": float(outputs["loss"]).hex(),
        }
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, (json.dumps(line) + "\n").encode())
        finally:
            os.close(file)


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over the names and the bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def train(directory: Path, ckpt_path: str | None, epochs: int, progress: bool) -> str:
    """Train in `directory`, from `ckpt_path` if given, and return the digest of the final weights."""
    directory.mkdir(parents=True, exist_ok=True)
    seed_everything(7, workers=True)
    model = DigitsClassifier()
    checkpoint = ModelCheckpoint(
        dirpath=directory / "checkpoints",
        filename="{epoch}-{step}-{val_acc:.4f}",
        monitor="val_acc",
        mode="max",
        save_top_k=2,
        save_last=True,
        every_n_train_steps=7,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        accumulate_grad_batches=2,
        deterministic=True,
        logger=False,
        default_root_dir=directory,
        callbacks=[checkpoint, BatchLog(directory / "log.jsonl")],
        enable_progress_bar=progress,
        enable_model_summary=False,
    )
    trainer.fit(model, ckpt_path=ckpt_path)
    digest = weights_digest(model)
    (directory / "digest.txt").write_text(digest + "\n")
    return digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ckpt-path", help='what to go on from: a file, "last" or "best"')
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--no-progress", action="store_true")
    arguments = parser.parse_args()
    print(train(arguments.directory, arguments.ckpt_path, arguments.epochs, not arguments.no_progress))


if __name__ == "__main__":
    main()
