"""Killed before any change to the directory, a run goes on from a whole file and ends with the files of a whole run."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from line_run import fit_line, names, read

from milepost.callbacks import KeepEvery, KeepNewest, ModelCheckpoint
from milepost.plugins import TorchCheckpointIO
from milepost.plugins.io.index import read_index

CHANGES = {"open", "os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.chmod", "os.truncate"}


def _in_a_child(work: Callable[[], Any]) -> int:
    """The exit code of a fork of this process that does `work`; negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _die_before_change(number: int, directory: Path) -> None:
    """End this process right before the `number`-th call of the operating system that changes `directory`."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in CHANGES and str(arguments[0]).startswith(str(directory)):
            if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                return
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "best and last": {"monitor": "train_loss", "mode": "min", "save_last": True},
    "linked": {"save_last": "link"},
    "several rules": {"retention": KeepNewest(1) | KeepEvery(4)},
}


def _fit(root: Path, kind: str, ckpt_path: str | None) -> None:
    checkpointer = ModelCheckpoint(root / "c", "{step}", every_n_train_steps=2, **ARGUMENTS[kind])
    trainer = fit_line(root, checkpointer, validate=False, ckpt_path=ckpt_path)
    (root / "source").write_text(str(trainer.ckpt_path or ""))


def _kill_before_each(folder: Path, kind: str, numbers: range) -> None:
    _fit(folder / "whole", kind, None)  # here, so that the children find everything imported
    expected = names(folder / "whole" / "c")
    weights = read(folder / "whole" / "c" / "step=4.ckpt")["state_dict"]
    for number in numbers:
        root = (folder / str(number)).resolve()

        def cut(root: Path = root, number: int = number) -> None:
            _die_before_change(number, root / "c")
            _fit(root, kind, None)

        ended = _in_a_child(cut)
        assert ended in (0, -signal.SIGKILL)
        for path in (root / "c").glob("*.ckpt"):
            TorchCheckpointIO().verify(path)
        assert _in_a_child(lambda root=root: _fit(root, kind, "auto")) == 0
        spared = {Path(source).name for source in [(root / "source").read_text()] if source}
        assert names(root / "c") - (spared - expected) == expected, f"killed before change {number}"
        resumed = read(root / "c" / "step=4.ckpt")["state_dict"]
        assert all(bool((resumed[name] == weights[name]).all()) for name in weights)
        assert {record["path"] for record in read_index(root / "c")} >= expected
        if ended == 0:
            assert number > 10
            return
    raise AssertionError("more changes than were tried")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("kind", "first"), list(zip(ARGUMENTS, (1, 2, 3), strict=True)))
def test_killed_before_every_third_change_the_run_ends_as_the_unbroken_one(
    tmp_path: Path, kind: str, first: int
) -> None:
    _kill_before_each(tmp_path, kind, range(first, 100, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_killed_before_any_change_the_run_ends_as_the_unbroken_one(tmp_path: Path, kind: str) -> None:
    _kill_before_each(tmp_path, kind, range(1, 100))
