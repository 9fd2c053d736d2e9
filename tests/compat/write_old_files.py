r"""Writes the files in ``tests/compat/old_lightning`` with real old versions of pytorch-lightning.

For each VERSION of `VERSIONS`::

    pip install --no-deps --target old/VERSION pytorch-lightning==VERSION
    pip install --no-deps --target old/extra setuptools==69.5.1 pyDeprecate==0.3.2 torchmetrics==0.11.4 \
        tensorboardX==2.6.2.2
    PYTHONPATH=old/VERSION:old/extra python tests/compat/write_old_files.py

torch is the present one: the old packages import with it, and the layout under test is Lightning's, not torch's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

VERSIONS = ("1.6.0", "1.6.5", "1.7.7", "1.8.6", "1.9.5", "2.0.9", "2.2.5", "2.5.0")
SEVERAL = ("1.6.0", "1.9.5")
PLACE = Path(__file__).with_name("old_lightning")
BATCHES = 6


def line(side: Any) -> Any:
    """A regression job that is the same on every side; nothing in it is random."""

    class Line(side.LightningModule):  # type: ignore[misc]
        def __init__(self, width: int = 2) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = torch.nn.Linear(width, 1)
            self.seen: list[tuple[int, int, int]] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.seen.append((self.current_epoch, batch_idx, self.global_step))
            loss: torch.Tensor = (self.net(batch[0]) - batch[1]).square().mean()
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    torch.manual_seed(3)
    return Line()


def pair(side: Any) -> Any:
    """Manual optimization with two optimizers."""

    class Pair(side.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.first, self.second = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
            self.seen: list[tuple[int, int, int]] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.seen.append((self.current_epoch, batch_idx, self.global_step))
            for net, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward((net(batch[0]) - batch[1]).square().mean())
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(net.parameters(), lr=0.05) for net in (self.first, self.second)]

    torch.manual_seed(3)
    return Pair()


def pair_of_1x(side: Any) -> Any:
    """The same as `pair` says it in automatic optimization, which took several optimizers before 2.0."""

    class AutomaticPair(type(pair(side))):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = True

        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> torch.Tensor:
            net = (self.first, self.second)[optimizer_idx]
            loss: torch.Tensor = (net(batch[0]) - batch[1]).square().mean()
            return loss

    torch.manual_seed(3)
    return AutomaticPair()


def loader() -> Any:
    inputs = torch.randn(2 * BATCHES, 2, generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=2)


def fit(
    side: Any, model: Any, place: Path, epochs: int, *, every: int | None = None, resume: Path | None = None
) -> tuple[Any, Any]:
    """Train to `epochs`, saving ``last.ckpt`` and the best after each, or a file per `every` optimizer steps."""
    validates = type(model).__name__ == "Line"
    options: dict[str, Any] = {"monitor": "val_loss", "save_last": True} if validates else {"save_last": True}
    if every is not None:
        options = {"every_n_train_steps": every, "save_top_k": -1, "filename": "{step}"}
    callbacks = [side.callbacks.ModelCheckpoint(dirpath=str(place), **options)]
    if validates:
        callbacks.append(side.callbacks.EarlyStopping("val_loss", patience=50))
    trainer = side.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, callbacks=callbacks, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1, default_root_dir=str(place),
    )  # fmt: skip
    data = [loader(), loader()] if validates else [loader()]
    trainer.fit(model, *data, ckpt_path=None if resume is None else str(resume))
    return trainer, model


def main() -> None:
    import tempfile

    import numpy

    numpy.Inf = numpy.inf  # type: ignore[attr-defined]  # gone from NumPy 2, used by Lightning before 2.1
    torch.optim.lr_scheduler._LRScheduler = torch.optim.lr_scheduler.LRScheduler  # type: ignore[assignment,misc]
    import pytorch_lightning as pl

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        fit(pl, line(pl), place / "epoch", 2)
        fit(pl, line(pl), place / "middle", 2, every=8)
        fit(pl, pair(pl), place / "manual", 2)
        kinds = {"epoch": "last", "middle": "step=8", "manual": "last"}
        if pl.__version__ in SEVERAL:
            fit(pl, pair_of_1x(pl), place / "several", 2)
            kinds["several"] = "last"
        for name, source in kinds.items():
            raw = (place / name / f"{source}.ckpt").read_bytes()
            (PLACE / f"{pl.__version__}-{name}.ckpt").write_bytes(raw)


if __name__ == "__main__":
    sys.exit(main())
