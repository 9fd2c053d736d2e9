"""The progress line: what it says, and that it stays silent where nobody watches."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from milepost.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from milepost.callbacks.progress import line
from milepost.errors import MisconfigurationException


def trainer(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "logger": None, "progress_bar_metrics": {"loss": torch.tensor(0.125)}, "is_global_zero": True, "max_epochs": 3,
        "current_epoch": 1, "num_training_batches": 4, "num_val_batches": [2],
        "sanity_checking": False, "training": True,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def test_line() -> None:
    assert line("Epoch 1/2", 3, 4, 2.0, {"v_num": 7, "loss": 0.5}) == "Epoch 1/2  3/4  2.00 it/s  v_num 7  loss 0.5"
    assert line("Predicting", 3, float("inf"), 2.0, {}) == "Predicting  3  2.00 it/s"


def test_draws_on_a_terminal_and_counts_only_batches_of_this_run() -> None:
    out, now = io.StringIO(), iter(range(100))
    bar = RichProgressBar(console=Console(file=out, force_terminal=True, width=120), clock=lambda: next(now))
    t, module = trainer(), torch.nn.Identity()
    bar.on_train_batch_start(t, module, None, 2)  # resumed midway: two batches were done by another process
    bar.on_train_batch_end(t, module, None, None, 2)
    bar.on_train_epoch_end(t, module)
    assert "Epoch 1/2  3/4  1.00 it/s  loss 0.125" in out.getvalue()


def test_refresh_rate_skips_batches_but_not_the_last() -> None:
    out = io.StringIO()
    bar = RichProgressBar(3, console=Console(file=out, force_terminal=True, width=120))
    t, module = trainer(), torch.nn.Identity()
    for i in range(4):
        bar.on_train_batch_start(t, module, None, i)
        bar.on_train_batch_end(t, module, None, None, i)
    bar.teardown(t, module, "fit")
    assert [f"{n}/4" in out.getvalue() for n in (1, 2, 3, 4)] == [False, False, True, True]


def test_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bar, t, module = TQDMProgressBar(), trainer(), torch.nn.Identity()
    bar.on_train_batch_start(t, module, None, 0)
    bar.on_train_batch_end(t, module, None, None, 0)
    bar.teardown(t, module, "fit")
    assert capsys.readouterr() == ("", "")


def test_disabled_off_rank_zero_and_can_be_enabled() -> None:
    bar = ProgressBar()
    bar.setup(trainer(is_global_zero=False), torch.nn.Identity(), "fit")
    assert not bar.is_enabled
    bar.enable()
    assert bar.is_enabled


def test_metrics_begin_with_the_version() -> None:
    t = trainer(logger=SimpleNamespace(version=3))
    assert list(ProgressBar().get_metrics(t, torch.nn.Identity())) == ["v_num", "loss"]


def test_a_negative_refresh_rate_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="-1"):
        RichProgressBar(-1)


@pytest.mark.parametrize(("environment", "drawn"), [({}, True), ({"CI": "1"}, False)])
def test_draws_on_a_real_terminal_unless_ci_is_set(environment: dict[str, str], drawn: bool) -> None:
    code = (
        "from types import SimpleNamespace as N\n"
        "from milepost.callbacks import RichProgressBar\n"
        "t = N(logger=None, progress_bar_metrics={}, max_epochs=3, current_epoch=1, num_training_batches=4)\n"
        "bar = RichProgressBar()\n"
        "bar.on_train_batch_start(t, None, None, 0); bar.on_train_batch_end(t, None, None, None, 0); bar._stop()\n"
        "print('end')\n"
    )
    ours, theirs = os.openpty()
    base = {key: value for key, value in os.environ.items() if key != "CI"}
    subprocess.run(
        [sys.executable, "-c", code],
        stdout=theirs,
        check=True,
        env={**base, "PYTHONPATH": "src", "TERM": "xterm", **environment},
    )
    text = b""
    while b"end" not in text:
        text += os.read(ours, 4096)
    os.close(ours)
    os.close(theirs)
    assert (b"Epoch 1/2" in text) == drawn
