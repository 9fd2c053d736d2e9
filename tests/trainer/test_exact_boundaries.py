"""Resuming where an epoch ends, is cut short or has other loaders: equal to the run that was never ended."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_exact_resume import Killed, Net, Points, Rows, SaveAndDie, Stream, everything
from torch.utils.data import DataLoader, IterableDataset, Sampler, Subset, random_split

from milepost import Trainer
from milepost.callbacks import Callback, Checkpoint, EarlyStopping
from milepost.data.stream import CombinedLoader


class Saver(Checkpoint):
    """Saves in one hook of the end of a run."""

    def __init__(self, hook: str, path: Path) -> None:
        self.hook, self.path = hook, path

    def save(self, trainer: Trainer, hook: str) -> None:
        if hook == self.hook and (hook != "on_train_epoch_end" or trainer.global_step == trainer.max_steps):
            torch.rand(3), random.random(), np.random.rand()  # what ends a run may draw random numbers
            trainer.save_checkpoint(self.path).result()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.save(trainer, "on_train_epoch_end")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.save(trainer, "on_train_end")

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.save(trainer, "on_fit_end")


def fit(
    folder: Path, data: Any, *callbacks: Callback, build: type[Net] = Net, resume: Path | None = None, **options: Any
) -> tuple[Trainer, Net]:
    torch.manual_seed(2 if resume is None else 71)
    random.seed(0 if resume is None else 9)
    np.random.seed(0 if resume is None else 9)
    net = build()
    options = {"max_epochs": 3, "accumulate_grad_batches": 2, "val_check_interval": 4, **options}
    trainer = Trainer(
        callbacks=[EarlyStopping("loss_epoch", patience=50, check_on_train_epoch_end=True), *callbacks], logger=Rows(),
        log_every_n_steps=1, enable_checkpointing=None if callbacks else False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip
    validation = DataLoader(Points(False), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(8))
    loaders = (data, validation) if data is not None else (None, None)
    trainer.fit(net, *loaders, ckpt_path=None if resume is None else str(resume))
    return trainer, net


def assert_goes_on(resumed: tuple[Trainer, Net], unbroken: tuple[Trainer, Net], first: tuple[int, int]) -> None:
    (trainer, net), (other, whole) = resumed, unbroken
    assert net.log_lines[0][:2] == first
    assert net.log_lines == whole.log_lines[-len(net.log_lines) :]
    rows = [row for row in trainer.logger.rows if row[0] != -1]
    assert rows == other.logger.rows[-len(rows) :]
    assert trainer.early_stopping_callback.state_dict() == other.early_stopping_callback.state_dict()
    for one, two in zip(everything(trainer, net), everything(other, whole), strict=True):
        assert torch.equal(one, two)


def shuffled(workers: int = 0) -> DataLoader[Any]:
    return DataLoader(
        Points(True), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(1), num_workers=workers
    )


@pytest.mark.parametrize("data", [shuffled, lambda: DataLoader(Stream(True), batch_size=3)], ids=["shuffle", "stream"])
@pytest.mark.parametrize("when", ["on_train_epoch_end", "on_train_end", "on_fit_end", "by the user", "after validate"])
def test_a_run_cut_by_max_steps_goes_on_inside_its_epoch(tmp_path: Path, when: str, data: Callable[[], Any]) -> None:
    path = tmp_path / "cut.ckpt"
    unbroken = fit(tmp_path, data())
    trainer, net = fit(tmp_path, data(), Saver(when, path), max_steps=6)  # 12 batches: 4 of 8 in epoch 1
    if when == "after validate":
        trainer.validate(net, DataLoader(Points(False), batch_size=8), verbose=False)
    if when in ("by the user", "after validate"):
        torch.rand(5)
        trainer.save_checkpoint(path).result()
    saved = torch.load(path, weights_only=True)
    assert (saved["epoch"], saved["global_step"]) == (1, 6)
    assert_goes_on(fit(tmp_path, data(), resume=path), unbroken, (1, 4))


def test_a_cut_run_that_is_resumed_and_ends_at_once_still_stands_there(tmp_path: Path) -> None:
    unbroken = fit(tmp_path, shuffled())
    trainer, _ = fit(tmp_path, shuffled(), Saver("on_train_end", tmp_path / "a.ckpt"), max_steps=6)
    trainer, net = fit(tmp_path, shuffled(), resume=tmp_path / "a.ckpt", max_steps=6)
    assert net.log_lines == []
    trainer.save_checkpoint(tmp_path / "b.ckpt").result()
    assert_goes_on(fit(tmp_path, shuffled(), resume=tmp_path / "b.ckpt"), unbroken, (1, 4))


class Drifting(IterableDataset[Any]):
    """Its position goes on from one epoch to the next, eight batches each."""

    def __init__(self) -> None:
        self.points, self.position = Points(True), 0

    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Iterator[Any]:
        for _ in range(24):
            self.position += 1
            yield self.points[self.position * 7 % 23]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Rotating(Sampler[int]):
    """Begins each epoch one further, and says so in a state dict."""

    def __init__(self) -> None:
        self.epochs = 0

    def __len__(self) -> int:
        return 23

    def __iter__(self) -> Iterator[int]:
        self.epochs += 1
        yield from ((i + self.epochs) % 23 for i in torch.randperm(23).tolist())

    def state_dict(self) -> dict[str, int]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epochs = state["epochs"]


LASTING: dict[str, Callable[[], Any]] = {
    "generator": shuffled,
    "generator and workers": lambda: shuffled(2),
    "dataset": lambda: DataLoader(Drifting(), batch_size=3),
    "sampler": lambda: DataLoader(Points(True), batch_size=3, sampler=Rotating()),
    "several": lambda: {"a": shuffled(), "b": [DataLoader(Points(False), batch_size=5, sampler=Rotating())]},
}


class Nested(Net):
    """Takes batches of one loader or of several."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if not isinstance(batch, dict):
            return super().training_step(batch, batch_idx)
        parts = [part for part in (batch["a"], *batch["b"]) if part is not None]
        return super().training_step([torch.cat(columns) for columns in zip(*parts, strict=True)], batch_idx)


@pytest.mark.parametrize("point", ["epoch end", "epoch start", "a finished fit"])
@pytest.mark.parametrize("kind", LASTING)
def test_what_lives_through_epochs_goes_on_between_them(tmp_path: Path, kind: str, point: str) -> None:
    path = tmp_path / "a.ckpt"
    unbroken = fit(tmp_path, LASTING[kind](), build=Nested)
    if point == "a finished fit":
        fit(tmp_path, LASTING[kind](), Saver("on_train_end", path), build=Nested, max_epochs=2)
    else:
        with pytest.raises(Killed):
            fit(tmp_path, LASTING[kind](), SaveAndDie(point, path), build=Nested)
    epoch = 1 if point == "epoch start" else 2
    assert_goes_on(fit(tmp_path, LASTING[kind](), build=Nested, resume=path), unbroken, (epoch, 0))


class Curriculum(Net):
    """Asks for other data as it goes, split at random by the global generator; notes when it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def train_dataloader(self) -> Any:
        self.asked.append(self.current_epoch)
        part, _ = random_split(Points(True), [0.8, 0.2])
        return DataLoader(Subset(part, range(8 + 2 * self.current_epoch)), batch_size=2, shuffle=True)

    def val_dataloader(self) -> Any:
        part, _ = random_split(Points(False), [0.5, 0.5])
        return DataLoader(part, batch_size=4 + self.current_epoch)


class DieAt(Checkpoint):
    """Saves after a batch of an epoch, or where the epoch is over, and ends the run."""

    def __init__(self, epoch: int, batch: int | None, path: Path) -> None:
        self.at, self.path = (epoch, batch), path

    def reach(self, trainer: Trainer, *at: int | None) -> None:
        if at == self.at:
            trainer.save_checkpoint(self.path).result()
            raise Killed

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.reach(trainer, trainer.current_epoch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.reach(trainer, trainer.current_epoch, None)


@pytest.mark.parametrize(("epoch", "batch"), [(0, 2), (1, 2), (1, None), (2, 0), (3, 4), (3, None)])
def test_loaders_that_are_asked_for_again(tmp_path: Path, epoch: int, batch: int | None) -> None:
    path = tmp_path / "a.ckpt"
    options = {"reload_dataloaders_every_n_epochs": 2, "max_epochs": 6, "val_check_interval": 1.0}
    unbroken = fit(tmp_path, None, build=Curriculum, **options)
    assert unbroken[1].asked == [0, 2, 4]  # type: ignore[attr-defined]
    with pytest.raises(Killed):
        fit(tmp_path, None, DieAt(epoch, batch, path), build=Curriculum, **options)
    resumed = fit(tmp_path, None, build=Curriculum, resume=path, **options)
    assert_goes_on(resumed, unbroken, (epoch + 1, 0) if batch is None else (epoch, batch + 1))
    assert resumed[1].asked == [e for e in (0, 2, 4) if e >= epoch // 2 * 2]  # type: ignore[attr-defined]


def test_a_fit_that_ended_at_a_reload_goes_on_with_the_new_loaders(tmp_path: Path) -> None:
    options = {"reload_dataloaders_every_n_epochs": 2, "val_check_interval": 1.0}
    unbroken = fit(tmp_path, None, build=Curriculum, max_epochs=4, **options)
    fit(tmp_path, None, Saver("on_train_end", tmp_path / "a.ckpt"), build=Curriculum, max_epochs=2, **options)
    resumed = fit(tmp_path, None, build=Curriculum, max_epochs=4, resume=tmp_path / "a.ckpt", **options)
    assert_goes_on(resumed, unbroken, (2, 0))
    assert resumed[1].asked == [2]  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size"])
@pytest.mark.parametrize("batch", [0, 2, None])
def test_nested_loaders_in_each_mode(tmp_path: Path, mode: str, batch: int | None) -> None:
    def data() -> Any:
        short = DataLoader(Points(True), batch_size=6, sampler=Rotating())
        # a stream that min_size ends midway goes on there in the next epoch, which is then one batch long
        other = DataLoader(Points(True) if mode == "min_size" else Stream(True), batch_size=5)
        return CombinedLoader({"a": shuffled(), "b": [short, other]}, mode)

    path = tmp_path / "a.ckpt"
    unbroken = fit(tmp_path, data(), build=Nested, val_check_interval=2)
    with pytest.raises(Killed):
        fit(tmp_path, data(), DieAt(1, batch, path), build=Nested, val_check_interval=2)
    resumed = fit(tmp_path, data(), build=Nested, val_check_interval=2, resume=path)
    assert_goes_on(resumed, unbroken, (2, 0) if batch is None else (1, batch + 1))
