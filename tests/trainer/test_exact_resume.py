"""A run killed anywhere goes on bit for bit: losses, sample order, weights, optimizer and random state."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from milepost import LightningModule, Trainer
from milepost.callbacks import Callback, Checkpoint
from milepost.loggers import Logger


class Points(Dataset[Any]):
    """Ten features a sample; with `augment`, noise from all three of the generators that datasets use."""

    def __init__(self, augment: bool) -> None:
        self.augment = augment
        self.x = torch.linspace(-1, 1, 230).reshape(23, 10)

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> Any:
        x = self.x[index]
        if self.augment:
            x = x + torch.randn(10) * 0.1 + float(np.random.rand()) * 0.1 + random.random() * 0.1
        return x, x.sum().reshape(1), index


class Stream(IterableDataset[Any]):
    """The same samples as a stream that knows its position; each worker takes every n-th."""

    def __init__(self, augment: bool) -> None:
        self.points = Points(augment)
        self.position = 0

    def __iter__(self) -> Any:
        info = torch.utils.data.get_worker_info()
        number, count = (info.id, info.num_workers) if info else (0, 1)
        while self.position * count + number < 23:
            index = self.position * count + number
            self.position += 1
            yield self.points[index]
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1))
        self.log_lines: list[tuple[Any, ...]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, index = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_lines.append((self.current_epoch, batch_idx, tuple(index.tolist()), float(loss.detach())))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        noise = torch.rand(())  # moves the random state of the process: validation, too, goes on from where it was
        self.log("val", nn.functional.mse_loss(self.net(batch[0]), batch[1]) + noise * 0.1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        stepwise = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.95)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9), "interval": "step"},
            {"scheduler": plateau, "monitor": "val"},
            {"scheduler": stepwise, "monitor": "loss_step", "interval": "step", "frequency": 2},
        ]


class Killed(BaseException):
    """Stands for the kill where it happens in process: nothing is saved on the way out, and nobody catches it."""


class Rows(Logger):
    """Keeps what the loggers are given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))


class SaveAndDie(Checkpoint):
    """Saves at one point of the run and ends it right there; or two batches later, in the midst of the next save."""

    def __init__(self, point: str, path: Path) -> None:
        self.point, self.path = point, path
        self.seen = 0

    def reach(self, trainer: Trainer, point: str) -> None:
        if point != self.point:
            return
        self.seen += 1
        if self.seen == {"batch inside accumulation": 9, "batch at a step": 5, "a save": 13}.get(point, 2):
            trainer.save_checkpoint(self.path).result()
            if point != "a save":
                raise Killed
        elif point == "a save" and self.seen == 15:
            fsync, os.fsync = os.fsync, killed
            try:
                trainer.save_checkpoint(self.path).result()
            finally:
                os.fsync = fsync

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        inside = (batch_idx + 1) % 3 != 0
        self.reach(trainer, "batch inside accumulation" if inside else "batch at a step")
        self.reach(trainer, "a save")

    def on_validation_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if arguments[-1] == 1 and not trainer.sanity_checking:
            self.reach(trainer, "validation")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.reach(trainer, "validation end")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.reach(trainer, "epoch end")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.reach(trainer, "epoch start")


def killed(number: int) -> None:
    """In the place of ``os.fsync``: the bytes are written, the name is not there yet."""
    raise Killed


def loader(data: str, workers: int, augment: bool) -> DataLoader[Any]:
    if data == "iterable":
        return DataLoader(Stream(augment), batch_size=3, num_workers=workers)
    if data == "weighted":
        sampler = WeightedRandomSampler(torch.arange(1, 24).double(), 23)
        return DataLoader(Points(augment), batch_size=3, sampler=sampler, num_workers=workers)
    return DataLoader(Points(augment), batch_size=3, shuffle=True, num_workers=workers)


def fit(
    folder: Path,
    data: str,
    workers: int,
    augment: bool,
    precision: str,
    *callbacks: Callback,
    ckpt_path: str | None = None,
) -> tuple[Trainer, Net]:
    torch.manual_seed(5 if ckpt_path is None else 99)  # a resumed process starts from other random state
    np.random.seed(6)
    random.seed(7)
    net = Net()
    trainer = Trainer(
        max_epochs=4,
        accumulate_grad_batches=3,
        precision=precision,
        val_check_interval=4,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        logger=Rows(),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(net, loader(data, workers, augment), DataLoader(Points(False), batch_size=8), ckpt_path=ckpt_path)
    return trainer, net


def everything(trainer: Trainer, net: Net) -> list[torch.Tensor]:
    moments = [v for s in trainer.optimizers[0].state.values() for v in s.values()]
    metrics = [trainer.callback_metrics[k] for k in sorted(trainer.callback_metrics)]
    rates = torch.tensor([g["lr"] for g in trainer.optimizers[0].param_groups])
    numpy = torch.as_tensor(np.random.get_state()[1].astype(np.int64))
    rng = [torch.get_rng_state(), numpy, torch.tensor(random.getstate()[1])]
    return [*net.state_dict().values(), *moments, *metrics, rates, *rng]


POINTS = ["batch inside accumulation", "batch at a step", "validation", "epoch end", "a save"]
DATA = ["shuffle", "weighted", "iterable"]
EVERY = list(itertools.product(POINTS, [0, 2], DATA, [False, True], ["32-true", "bf16-mixed"]))
# each pair of values of any two of the five properties is among these; the rest runs with -m slow
PAIRWISE = [
    case
    for case in EVERY
    if (POINTS.index(case[0]) + DATA.index(case[2]) + 2 * case[3] + (case[4] != "32-true") + (case[1] > 0)) % 5 == 0
]


@pytest.mark.parametrize("case", PAIRWISE, ids=lambda c: "-".join(map(str, c)).replace(" ", "_"))
def test_exact(tmp_path: Path, case: tuple[Any, ...]) -> None:
    check(tmp_path, *case)


@pytest.mark.parametrize("point", ["validation end", "epoch start"])
@pytest.mark.parametrize(("data", "workers"), [("shuffle", 0), ("iterable", 2)])
def test_exact_at_the_points_between(tmp_path: Path, point: str, data: str, workers: int) -> None:
    check(tmp_path, point, workers, data, True, "32-true")


def test_each_pair_of_properties_is_tried() -> None:
    for (i, one), (j, other) in itertools.combinations(enumerate(zip(*EVERY, strict=True)), 2):
        assert {(case[i], case[j]) for case in PAIRWISE} == set(itertools.product(one, other))


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=lambda c: "-".join(map(str, c)).replace(" ", "_"))
def test_exact_everywhere(tmp_path: Path, case: tuple[Any, ...]) -> None:
    check(tmp_path, *case)


def check(folder: Path, point: str, workers: int, data: str, augment: bool, precision: str) -> None:
    unbroken_trainer, unbroken = fit(folder, data, workers, augment, precision)
    expected = [t.clone() for t in everything(unbroken_trainer, unbroken)]
    path = folder / "killed.ckpt"
    with pytest.raises(Killed):
        fit(folder, data, workers, augment, precision, SaveAndDie(point, path))
    trainer, resumed = fit(folder, data, workers, augment, precision, ckpt_path=str(path))
    count = len(resumed.log_lines)
    assert 0 < count < len(unbroken.log_lines)
    assert resumed.log_lines == unbroken.log_lines[-count:]
    rows = trainer.logger.rows
    assert rows == unbroken_trainer.logger.rows[-len(rows) :]
    found = everything(trainer, resumed)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_real_kills_in_processes_of_their_own(tmp_path: Path) -> None:
    """SIGKILL inside accumulation, at an optimizer step, in a validation, at an epoch's end, in a save; then again."""
    program = Path(__file__).parent / "killed_run.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    whole = report.pop("never")
    assert set(report) == {"accumulation", "step", "zero_grad", "validation", "epoch_end", "save"}
    for where, run in report.items():
        assert (run["killed"], run["again"]) == (-signal.SIGKILL, 0), where
        assert run["resumed_at"] > 0, where
        assert run["digest"] == whole["digest"], where  # of weights, moments and random state
