"""Evaluating, predicting and loading leave the caller's random state alone, and no worker processes behind."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_exact_resume import Net, Points
from torch.utils.data import DataLoader

from milepost import DataModule, Trainer
from milepost.data.rng import RngState


class Drawing(Net):
    """Draws in every hook and step, and where it is made."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.draw()

    def draw(self) -> None:
        torch.rand(1), random.random(), np.random.rand()

    def setup(self, stage: str) -> None:
        self.draw()

    def on_test_batch_start(self, *arguments: Any) -> None:
        self.draw()

    def on_validation_epoch_start(self) -> None:
        self.draw()

    def on_predict_start(self) -> None:
        self.draw()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.draw()
        super().validation_step(batch, batch_idx)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.draw()
        return self.net(batch[0])


class Data(DataModule):
    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.rand(1)


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, **options,
    )  # fmt: skip


def loader(workers: int = 0) -> DataLoader[Any]:
    return DataLoader(
        Points(True), batch_size=4, shuffle=True, num_workers=workers, persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    fitted = trainer(folder)
    fitted.fit(Drawing(), loader(), DataLoader(Points(False), batch_size=8), datamodule=None)
    fitted.save_checkpoint(folder / "a.ckpt").result()
    checkpoint = torch.load(folder / "a.ckpt", weights_only=True)
    checkpoint["datamodule_hyper_parameters"] = {"size": 4}
    torch.save(checkpoint, folder / "a.ckpt")
    return folder / "a.ckpt"


CALLS: dict[str, Callable[[Path, Path, Drawing], Any]] = {
    "validate": lambda folder, path, model: trainer(folder).validate(model, loader(), verbose=False),
    "test": lambda folder, path, model: trainer(folder).test(model, loader(), verbose=False, ckpt_path=str(path)),
    "predict": lambda folder, path, model: trainer(folder).predict(model, loader()),
    "predict with workers": lambda folder, path, model: trainer(folder).predict(model, loader(2)),
    "load_from_checkpoint": lambda folder, path, model: Drawing.load_from_checkpoint(path),
    "a data module's": lambda folder, path, model: Data.load_from_checkpoint(path),
}


@pytest.mark.parametrize("call", CALLS)
def test_leaves_the_callers_random_state_alone(call: str, saved: Path, tmp_path: Path) -> None:
    model = Drawing()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = RngState.capture()
    CALLS[call](tmp_path, saved, model)
    after = RngState.capture()
    assert (after.python, after.numpy[2:]) == (before.python, before.numpy[2:])
    assert np.array_equal(after.numpy[1], before.numpy[1])
    assert torch.equal(after.torch, before.torch)


@pytest.mark.parametrize("fn", ["fit", "validate", "test", "predict"])
def test_no_worker_outlives_the_run(fn: str, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    model, data = Drawing(), (loader(2),)
    if fn == "fit":
        data = (loader(2), DataLoader(Points(False), batch_size=8, num_workers=2, persistent_workers=True))
    getattr(run, fn)(model, *data)
    assert multiprocessing.active_children() == []


def test_no_worker_outlives_a_run_that_fails(tmp_path: Path) -> None:
    class Failing(Drawing):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                raise ArithmeticError

    validation = DataLoader(Points(False), batch_size=8, num_workers=1, persistent_workers=True)
    with pytest.raises(ArithmeticError):
        trainer(tmp_path, num_sanity_val_steps=0).fit(Failing(), loader(1), validation)
    assert multiprocessing.active_children() == []
