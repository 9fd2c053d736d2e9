"""The crash file: written on an exception, kept until a later fit has saved something newer."""

from __future__ import annotations

from pathlib import Path

import pytest
from line_run import Line, fit_line, loader, names, read

from milepost.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from milepost.errors import MisconfigurationException


def _crash(root: Path, **options: object) -> OnExceptionCheckpoint:
    callback = OnExceptionCheckpoint(root / "crash")
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit_line(root, callback, stop_at=2, **options)  # type: ignore[arg-type]
    return callback


def test_the_state_at_the_exception_is_saved_and_the_exception_goes_on(tmp_path: Path) -> None:
    callback = _crash(tmp_path)
    assert callback.ckpt_path == str(tmp_path / "crash" / "on_exception.ckpt")
    assert read(callback.ckpt_path)["global_step"] == 2


def test_a_run_that_ends_well_writes_nothing(tmp_path: Path) -> None:
    fit_line(tmp_path, OnExceptionCheckpoint(tmp_path / "crash", "boom"))
    assert not (tmp_path / "crash").exists()


def test_validate_leaves_the_crash_file_alone(tmp_path: Path) -> None:
    callback = _crash(tmp_path)
    trainer = fit_line(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.callbacks.append(callback)
    trainer.validate(Line(), loader(), verbose=False)
    assert names(tmp_path / "crash") == {"on_exception.ckpt"}


def test_a_later_fit_that_saved_something_newer_removes_it(tmp_path: Path) -> None:
    callback = _crash(tmp_path)
    with pytest.warns(UserWarning, match="an exception left a checkpoint behind"):
        fit_line(tmp_path, callback, ModelCheckpoint(tmp_path / "c"))
    assert names(tmp_path / "crash") == set()
    assert len(names(tmp_path / "c")) == 1


def test_a_later_fit_that_saved_nothing_keeps_it(tmp_path: Path) -> None:
    callback = _crash(tmp_path)
    with pytest.warns(UserWarning, match="an exception left a checkpoint behind"):
        fit_line(tmp_path, callback, ModelCheckpoint(tmp_path / "c", every_n_epochs=0))
    assert names(tmp_path / "crash") == {"on_exception.ckpt"}


@pytest.mark.parametrize("ckpt_path", ["last", "auto"])
def test_what_an_exception_left_is_what_last_and_auto_go_on_from(tmp_path: Path, ckpt_path: str) -> None:
    callback = _crash(tmp_path)
    trainer = fit_line(tmp_path, callback, ckpt_path=ckpt_path, max_steps=3)
    assert trainer.ckpt_path == callback.ckpt_path and trainer.global_step == 3


def test_a_save_that_fails_does_not_hide_the_exception(tmp_path: Path) -> None:
    (tmp_path / "crash").write_bytes(b"a file where the directory should be")
    with pytest.warns(UserWarning, match="no checkpoint could be saved"):
        _crash(tmp_path)


def test_an_empty_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="filename is empty"):
        OnExceptionCheckpoint(tmp_path, "")
