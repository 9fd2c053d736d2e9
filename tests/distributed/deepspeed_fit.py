"""Runs of a Trainer with DeepSpeed on two ranks, for test_deepspeed.py.

Usage: torchrun --nproc-per-node 2 deepspeed_fit.py {stages,killed,resumed,single} DIRECTORY; for "single", on one rank
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed_loop import Cupboard
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import milepost
from milepost.callbacks import ModelCheckpoint
from milepost.errors import ResumeError
from milepost.plugins import SnapshotCheckpointIO, TorchCheckpointIO
from milepost.plugins.io import checkpoint_io as calls
from milepost.strategies import DDPStrategy, DeepSpeedStrategy


class Net(milepost.Module):
    """Batch norm, dropout, a parameter that is frozen, one of the module's own, two groups, a scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(7, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.scale, self.drop = nn.Parameter(torch.ones(3)), nn.Dropout(0.2)
        self.first.bias.requires_grad_(False)
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.drop(torch.relu(self.norm(self.first(x))))) * self.scale

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self(batch[0]).float().pow(2).mean()
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self(batch[0]).float().pow(2).mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        others = [*self.norm.parameters(), *self.second.parameters(), self.scale]
        optimizer = torch.optim.AdamW([{"params": self.first.parameters()}, {"params": others, "lr": 0.02}], lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}]

    def train_dataloader(self) -> Any:
        return DataLoader(_samples(48), batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(_samples(8), batch_size=4)


def _samples(count: int) -> TensorDataset:
    return TensorDataset(torch.randn(count, 7, generator=torch.Generator().manual_seed(count)))


def _ranks() -> int:
    return int(os.environ["WORLD_SIZE"])


def trainer_of(strategy: Any, folder: Path, **options: Any) -> milepost.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return milepost.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=_ranks(),
        max_epochs=2,
        default_root_dir=folder,
        **quiet,
        **options,
    )


def checkpointer(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=2, monitor="step", mode="max",
                           every_n_train_steps=3, save_last="link")  # fmt: skip


def fitted(strategy: Any, folder: Path, **options: Any) -> Net:
    milepost.seed_everything(5)
    net = Net()
    fit = {key: options.pop(key) for key in ("ckpt_path", "restore") if key in options}
    if fit:
        torch.manual_seed(99 + dist.get_rank())  # what is not restored shows
    trainer_of(strategy, folder, **options).fit(net, **fit)
    return net


def same(net: Net, other: Net) -> bool:
    a, b = net.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def check_stage(stage: int, io: Any, root: Path, reference: list[float]) -> None:
    """Trained as DDP does, saved by parts through `io`; DeepSpeed and DDP both go on from it, bit for bit."""
    folder = root / f"stage{stage}"
    options: dict[str, Any] = {"plugins": io, "accumulate_grad_batches": 2 if stage == 2 else 1}
    net = fitted(DeepSpeedStrategy(stage=stage), folder, callbacks=[checkpointer(folder)], **options)
    if stage != 2:
        assert net.losses == reference, (stage, net.losses)
    saved = str(folder / ("step=3.ckpt" if stage == 2 else "step=9.ckpt"))
    assert calls.exists(io, saved)
    assert not calls.exists(io, str(folder / "step=3.ckpt")) or stage == 2  # removed, through the plugin
    resumed = fitted(DeepSpeedStrategy(stage=stage), folder, ckpt_path=saved, **options)
    assert resumed.losses == net.losses[-len(resumed.losses) :] and len(resumed.losses) < len(net.losses)
    assert same(resumed, net)
    with pytest.raises(ResumeError, match=f"saved by DeepSpeed with stage={stage}"):
        fitted(DeepSpeedStrategy(stage=1 + stage % 3), folder, ckpt_path=saved, **options)
    plain = fitted(DDPStrategy(), folder, ckpt_path=saved, **options)
    if stage != 2:  # where gradients are added up, the order of the sums is DeepSpeed's own
        assert plain.losses == resumed.losses, (stage, plain.losses, resumed.losses)
    weights = {"ckpt_path": saved, "restore": {"model"}, "limit_train_batches": 0}
    started = fitted(DeepSpeedStrategy(stage=stage), folder, **weights, **options)
    stored = calls.load(io, saved)["state_dict"]
    assert all(torch.equal(value, stored[name]) for name, value in started.state_dict().items())
    calls.teardown(io)


def stages(root: Path) -> None:
    io = TorchCheckpointIO()
    folder = root / "ddp"
    reference = fitted(DDPStrategy(), folder, callbacks=[checkpointer(folder)], plugins=io)
    for stage, plugin in ((0, io), (1, Cupboard(root / "cupboard")), (2, io), (3, SnapshotCheckpointIO())):
        check_stage(stage, plugin, root, reference.losses)
    with pytest.raises(ResumeError, match="not saved by DeepSpeed"):
        fitted(DeepSpeedStrategy(), folder, ckpt_path=str(folder / "step=9.ckpt"), plugins=io)
    half = fitted("deepspeed_stage_3", root / "half", precision="bf16-true", plugins=io, limit_train_batches=0)
    assert next(half.parameters()).dtype in (torch.float32, torch.bfloat16)


def single(root: Path) -> None:
    """One device without DeepSpeed goes on with the rest of the epoch; DeepSpeed on one rank says what it can take."""
    for stage, io in ((1, Cupboard(root / "cupboard")), (3, SnapshotCheckpointIO())):
        saved = str(root / f"stage{stage}" / "step=9.ckpt")
        milepost.seed_everything(5)
        net = Net()
        trainer = trainer_of("auto", root / "single", plugins=io)
        trainer.fit(net, ckpt_path=saved)
        assert len(net.losses) == 6 and trainer.global_step == 15  # 24 of the 48 samples had been seen
        with pytest.raises(ResumeError, match="ranks=2, and this run has ranks=1"):
            trainer_of(DeepSpeedStrategy(stage=stage), root / "single", plugins=io).fit(Net(), ckpt_path=saved)


class Deadly(TorchCheckpointIO):
    """Kills rank 1 in its part of the third save."""

    saves = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.saves += 1
        if dist.get_rank() == 1 and self.saves == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        super().save_checkpoint(checkpoint, path)


def run(mode: str, root: Path) -> None:
    io = Deadly() if mode == "killed" else TorchCheckpointIO()
    folder = root / "run"
    milepost.seed_everything(5)
    net = Net()
    trainer = trainer_of("deepspeed_stage_2", folder, callbacks=[checkpointer(folder)], plugins=io)
    trainer.fit(net, ckpt_path="last" if mode == "resumed" else None)
    root.mkdir(exist_ok=True)
    torch.save((net.losses, net.state_dict()), root / f"{mode}{trainer.global_rank}.pt")


if __name__ == "__main__":
    mode, root = sys.argv[1], Path(sys.argv[2])
    {"stages": stages, "single": single}.get(mode, lambda root: run(mode, root))(root)
    if mode == "stages":
        run("unbroken", root / "unbroken")
