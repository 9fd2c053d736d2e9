"""What test_ddp runs on two ranks, in processes that torch's launcher starts."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

import milepost
from milepost.callbacks import Callback, ModelCheckpoint

SAMPLES = 24
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Points(Dataset[Any]):
    """Numbered points; reading one draws a random number, as an augmentation does."""

    def __init__(self, samples: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(samples, 3, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] + torch.rand(3) / 8, self.x[index].sum(), index


def net_of(library: Any, *, dropout: float = 0.25) -> type[Any]:
    """The module of these runs, derived from `library`'s."""

    class Net(library.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(dropout), torch.nn.Linear(8, 1)
            )
            self.losses: list[float] = []
            self.samples: list[int] = []

        def loss(self, batch: Any) -> Any:
            return (self.layers(batch[0]).squeeze(1) - batch[1]).square().mean()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.losses.append(loss.item())
            self.samples += batch[2].tolist()
            self.log("train", loss, on_step=True, on_epoch=True, sync_dist=True)
            self.log("alone", loss, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.loss(batch)
            self.log("val", loss, sync_dist=True)
            self.log("most", loss, sync_dist=True, reduce_fx="max")
            self.log("all", loss, sync_dist=True, reduce_fx="sum")

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]

    return Net


class SaveAt(Callback):
    """Saves after each of the batches named, counted over the run."""

    def __init__(self, folder: Path, batches: list[int]) -> None:
        self.folder, self.batches = folder, batches

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        batch = trainer.fit_loop.progress.batch.total.ready
        if batch in self.batches:
            trainer.save_checkpoint(self.folder / f"batch{batch}.ckpt")


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(Points(), batch_size=3, shuffle=True), DataLoader(Points(9), batch_size=2)


def digest(trainer: Any, net: Any) -> str:
    """Of all that the run has come to, random state included."""
    hashed = hashlib.sha256()
    moments = (value for state in trainer.optimizers[0].state.values() for value in state.values())
    for tensor in [*net.state_dict().values(), *moments, torch.get_rng_state()]:
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        hashed.update(whole.detach().cpu().numpy().tobytes())
    return hashed.hexdigest()


def fit(folder: Path, *callbacks: Callback, seed: int = 7, ckpt_path: Any = None, **options: Any) -> tuple[Any, Any]:
    """Three epochs of four batches of a rank, two accumulated for each step."""
    torch.manual_seed(seed + int(os.environ.get("RANK", 0)))  # ranks draw other numbers
    net = options.pop("net", None) or net_of(milepost)()
    arguments: dict[str, Any] = {
        "accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 3, "accumulate_grad_batches": 2,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), "default_root_dir": folder,
        **QUIET,
    }  # fmt: skip
    trainer = milepost.Trainer(callbacks=list(callbacks), **{**arguments, **options})
    trainer.fit(net, *loaders(), ckpt_path=ckpt_path)
    return trainer, net


class Kill(Callback):
    """Kills one rank at a batch, the first time that the ranks are started."""

    def __init__(self, rank: int, batch: int) -> None:
        self.rank, self.batch = rank, batch

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if first and trainer.global_rank == self.rank and trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, kill: Callable[[], Callback]) -> None:
    saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, monitor=None)
    trainer, net = fit(folder, kill(), saver, ckpt_path="auto")
    resumed = Path(trainer.ckpt_path or "none").name
    (folder / f"rank{trainer.global_rank}.txt").write_text(f"{digest(trainer, net)} {resumed}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), lambda: Kill(rank=1, batch=7))
