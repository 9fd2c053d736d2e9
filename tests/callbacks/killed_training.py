"""One training job for test_killed_training: goes on from what is there, kills itself where it is told."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from both_sides import points

from milepost import Module, Trainer
from milepost.callbacks import BackboneFinetuning, Callback, ModelCheckpoint, StochasticWeightAveraging


class Kill(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.3))
        self.head = torch.nn.Linear(6, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = (self.head(self.backbone(batch[0])) - batch[1]).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


def train(folder: Path, kill_at: int = -1) -> str:
    """Train, from what is in `folder`; returns a digest of the weights."""
    torch.manual_seed(0)
    net, saves = Net(), ModelCheckpoint(folder, every_n_train_steps=4, save_last=True)
    averaging = StochasticWeightAveraging(0.05, swa_epoch_start=3, annealing_epochs=3)
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    trainer = Trainer(
        max_epochs=4, logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[Kill(kill_at), finetuning, averaging, saves],
    )  # fmt: skip
    trainer.fit(net, points(), ckpt_path="auto")
    digest = hashlib.sha256()
    for tensor in net.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    print(train(Path(sys.argv[1]), int(sys.argv[2])))
