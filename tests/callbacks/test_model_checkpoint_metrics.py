"""Monitored values are true for the step they are saved under; a wrong monitor never means zero files."""

from __future__ import annotations

from pathlib import Path

import pytest
from line_run import fit_line, names, read

from milepost.callbacks import ModelCheckpoint


def test_one_epoch_with_a_step_trigger_and_a_validation_metric_leaves_a_file(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "{step}-{val}", monitor="val", every_n_train_steps=2)
    fit_line(tmp_path, checkpointer, values=[0.5])
    assert names(tmp_path / "c") == {"step=4-val=0.5.ckpt"}


def test_a_step_trigger_waits_for_the_validation_of_its_step(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(
        tmp_path / "c", "{step}-{val}", monitor="val", every_n_train_steps=2, save_top_k=-1, save_last=True
    )
    fit_line(tmp_path, checkpointer, max_epochs=2, values=[0.5, 0.25])
    # At steps 2 and 6 there is no value of that step: its decision falls at the next validation, with that value.
    assert names(tmp_path / "c") == {"step=4-val=0.5.ckpt", "step=8-val=0.25.ckpt", "last.ckpt"}


def test_a_step_trigger_refreshes_the_last_without_a_metric(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", monitor="val", every_n_train_steps=2, save_last=True)
    with pytest.raises(RuntimeError, match="stopped"):
        fit_line(tmp_path, checkpointer, stop_at=3)
    assert names(tmp_path / "c") == {"last.ckpt"}
    assert read(tmp_path / "c" / "last.ckpt")["global_step"] == 2


def test_a_stale_value_never_names_a_file(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(
        tmp_path / "c", "{step}-{val}", monitor="val", every_n_train_steps=3, save_top_k=-1, save_last=True
    )
    fit_line(tmp_path, checkpointer, max_epochs=2, values=[0.5, 0.25])
    # Step 3 waits for step 4's validation, step 6 for step 8's: the value of 4 is never given to 6.
    assert names(tmp_path / "c") == {"step=4-val=0.5.ckpt", "step=8-val=0.25.ckpt", "last.ckpt"}


def test_a_training_metric_of_the_step_decides_at_once(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "{step}", monitor="train_loss", every_n_train_steps=2, save_top_k=-1)
    fit_line(tmp_path, checkpointer, validate=False)
    assert names(tmp_path / "c") == {"step=2.ckpt", "step=4.ckpt"}


def test_a_misspelt_monitor_warns_and_still_saves(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "{step}", monitor="vall", every_n_train_steps=3)
    with pytest.warns(UserWarning, match=r"'vall'.*Available: train_loss, val, val/x"):
        fit_line(tmp_path, checkpointer, max_epochs=2)
    assert names(tmp_path / "c") == {"step=6.ckpt"}


def test_a_misspelt_monitor_with_an_epoch_trigger_still_saves(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "{epoch}-{vall:.2f}", monitor="vall")
    with pytest.warns(UserWarning, match="'vall'"):
        fit_line(tmp_path, checkpointer, max_epochs=2)
    assert names(tmp_path / "c") == {"epoch=1-vall=nan.ckpt"}


def test_a_run_too_short_for_any_validation_leaves_a_file(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "{step}-{val:.2f}", monitor="val", every_n_train_steps=1)
    fit_line(tmp_path, checkpointer, max_steps=2, check_val_every_n_epoch=5)
    assert names(tmp_path / "c") == {"step=2-val=nan.ckpt"}
