"""A run that was killed and goes on in the same version leaves each row once: those of the unbroken run."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from milepost import Module, Trainer
from milepost.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from milepost.loggers import CSVLogger, TensorBoardLogger


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch[0]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.layer(batch[0]).sum(), on_step=True, on_epoch=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "interval": "step", "monitor": "loss"}}


class SaveAtEachHook(Callback):
    """Files at every point at which the loop can be saved, numbered in order."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def _save(self, trainer: Trainer, *_: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{self.count:02}.ckpt").result()
            self.count += 1

    on_train_epoch_start = on_train_batch_end = on_validation_end = on_train_epoch_end = _save


def fit(folder: Path, logger: Any, *callbacks: Any, resume: Path | None = None) -> Trainer:
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.arange(40.0).reshape(10, 4) / 40), batch_size=2)
    saving = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = Trainer(
        max_epochs=2, logger=logger, accelerator="cpu", default_root_dir=folder, log_every_n_steps=2,
        val_check_interval=3, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=saving,
        num_sanity_val_steps=0, callbacks=[LearningRateMonitor("step"), *callbacks],
    )  # fmt: skip
    trainer.fit(Net(), data, data, ckpt_path=None if resume is None else str(resume))
    return trainer


def rows(logger: CSVLogger) -> list[dict[str, str]]:
    with logger.metrics_file.open(newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_whatever_point_it_goes_on_from(tmp_path: Path) -> None:
    whole = CSVLogger(tmp_path, version="whole")
    saver = SaveAtEachHook(tmp_path)
    fit(tmp_path, whole, saver)
    assert saver.count > 12
    unbroken = rows(whole)
    for number in range(saver.count):  # as if killed long after that checkpoint
        again = CSVLogger(tmp_path, version="whole", flush_logs_every_n_steps=3)
        fit(tmp_path, again, resume=tmp_path / f"{number:02}.ckpt")
        assert rows(again) == unbroken, f"from checkpoint {number}"


def test_a_version_that_was_moved_is_known_by_its_rows(tmp_path: Path) -> None:
    whole, saver = CSVLogger(tmp_path, version="whole"), SaveAtEachHook(tmp_path)
    fit(tmp_path, whole, saver)
    again = CSVLogger(tmp_path, version="moved")
    shutil.copytree(whole.log_dir, again.log_dir)
    fit(tmp_path, again, resume=tmp_path / "09.ckpt")
    assert rows(again) == rows(whole)


def test_rows_of_another_run_are_left_alone(tmp_path: Path) -> None:
    saver = SaveAtEachHook(tmp_path)
    fit(tmp_path, CSVLogger(tmp_path, version="one"), saver)
    other = CSVLogger(tmp_path, version="other")
    for step in range(40):
        other.log_metrics({"theirs": step}, step)
    other.save()
    logger = CSVLogger(tmp_path, version="other")
    fit(tmp_path, logger, resume=tmp_path / "09.ckpt")
    assert [r["step"] for r in rows(logger)[:40]] == [str(step) for step in range(40)] and len(rows(logger)) > 40


def kept(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="kept", every_n_train_steps=6, enable_version_counter=False)


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from test_resumed import fit, kept
from milepost.callbacks import Callback
from milepost.loggers import CSVLogger
class Kill(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 8: os.kill(os.getpid(), signal.SIGKILL)
folder = Path(sys.argv[1])
fit(folder, CSVLogger(folder, version=0, flush_logs_every_n_steps=1), Kill(), kept(folder))
"""


def test_a_process_that_was_killed_and_started_again(tmp_path: Path) -> None:
    place = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], env=place, cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    logger, whole = CSVLogger(tmp_path, version=0, flush_logs_every_n_steps=1), CSVLogger(tmp_path, version="whole")
    before = rows(logger)
    fit(tmp_path, logger, kept(tmp_path), resume=tmp_path / "kept.ckpt")
    fit(tmp_path, whole)
    assert len(before) > 6 and rows(logger) == rows(whole)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_each_event_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def events(logger: TensorBoardLogger) -> dict[str, list[tuple[int, float]]]:
        found = EventAccumulator(logger.log_dir)
        found.Reload()
        tags = found.Tags()["scalars"]
        return {tag: sorted((e.step, e.value) for e in found.Scalars(tag)) for tag in tags}

    whole = TensorBoardLogger(tmp_path, version="a")
    fit(tmp_path, whole, SaveAtEachHook(tmp_path))
    unbroken = events(whole)
    (Path(whole.log_dir) / "events.out.tfevents.1.another").write_bytes(b"")
    for number in (2, 5, 9):
        again = TensorBoardLogger(tmp_path, version=number)
        shutil.copytree(whole.log_dir, again.log_dir)
        fit(tmp_path, again, resume=tmp_path / f"{number:02}.ckpt")
        assert events(again) == unbroken, f"from checkpoint {number}"
        assert (Path(again.log_dir) / "events.out.tfevents.1.another").exists()
    fit(tmp_path, again, resume=tmp_path / "05.ckpt")
    fit(tmp_path, again, resume=tmp_path / "09.ckpt")  # of a branch that was left since: nothing may be lost
    assert set(events(again)["loss_step"]) == set(unbroken["loss_step"])
