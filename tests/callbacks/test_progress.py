"""The progress line: what it says, and that it stays silent where nobody watches."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from milepost.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from milepost.callbacks._progress_line import Progress, RichProgressBarTheme
from milepost.errors import MisconfigurationException


def trainer(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "logger": None, "progress_bar_metrics": {"loss": torch.tensor(0.125)}, "is_global_zero": True, "max_epochs": 3,
        "current_epoch": 1, "num_training_batches": 4, "num_val_batches": [2],
        "sanity_checking": False, "training": True,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def test_a_line_says_how_far_how_fast_and_how_long_still() -> None:
    progress = Progress("Epoch 1/2", 8, begun=10.0, first=2, done=4, metrics={"v_num": 7, "loss": torch.tensor(0.5)})
    shown = progress.render(14.0, 80, RichProgressBarTheme()).plain
    assert shown.startswith("Epoch 1/2 ━") and (shown.count("━"), shown.count("─")) == (9, 10)
    assert shown.endswith(" 4/8 0:00:04 • 0:00:08 0.50it/s v_num: 7 loss: 0.5")
    assert len(shown) <= 80


def test_a_line_of_unknown_length_and_one_in_a_narrow_place() -> None:
    theme = RichProgressBarTheme(metrics_format=".1f", metrics_text_delimiter=" | ")
    progress = Progress("Predicting", float("inf"), begun=0.0, done=3, metrics={"a": 1.26, "b": 2})
    assert progress.render(2.0, 80, theme).plain == "Predicting 3/-- 0:00:02 • -:--:-- 1.50it/s a: 1.3 | b: 2"
    narrow = Progress("Epoch 0/1", 10, begun=0.0, done=3, metrics={"accuracy": 0.25})
    assert len(narrow.render(2.0, 40, theme).plain) == 40 and "━" not in narrow.render(2.0, 40, theme).plain


def plain(text: str) -> str:
    """`text` without the terminal's colours and movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def drive(bar: RichProgressBar, t: Any, batches: range) -> None:
    module: Any = torch.nn.Identity()
    for i in batches:
        bar.on_train_batch_start(t, module, None, i)
        bar.on_train_batch_end(t, module, None, None, i)


def test_draws_on_a_terminal_and_counts_only_batches_of_this_run() -> None:
    out, now = io.StringIO(), iter(range(100))
    bar = RichProgressBar(console=Console(file=out, force_terminal=True, width=120), clock=lambda: next(now))
    drive(bar, trainer(), range(2, 3))  # resumed midway: two batches were done by another process
    shown = plain(out.getvalue())
    assert shown.startswith("Epoch 1/2") and "3/4 0:00:01 • 0:00:01 1.00it/s loss: 0.125" in shown


def test_refresh_rate_and_time_skip_batches_but_not_the_last() -> None:
    def seen(refresh_rate: int, seconds: float) -> list[bool]:
        out, now = io.StringIO(), itertools.count(0.0, seconds)
        console = Console(file=out, force_terminal=True, width=120)
        bar = RichProgressBar(refresh_rate, console=console, clock=lambda: next(now))
        drive(bar, trainer(), range(4))
        bar.teardown(trainer(), torch.nn.Identity(), "fit")  # type: ignore[arg-type]
        return [f"{n}/4" in out.getvalue() for n in (1, 2, 3, 4)]

    assert seen(3, 1.0) == [False, False, True, True]
    assert seen(1, 1.0) == [True, True, True, True]
    assert seen(1, 0.01) == [True, False, False, True]


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


SCRIPT = """
import sys, torch
from pathlib import Path
from torch.utils.data import DataLoader, TensorDataset
from milepost import Module, Trainer
from milepost.callbacks import ModelCheckpoint
class Net(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            print("written by the user")
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss
    def validation_step(self, batch, batch_idx):
        self.log("val", self.layer(batch[0]).sum(), prog_bar=True)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
data = DataLoader(TensorDataset(torch.ones(12, 4)), batch_size=2)
folder = Path(sys.argv[1])
trainer = Trainer(max_epochs=2, logger=False, accelerator="cpu", val_check_interval=3, enable_model_summary=False,
                  callbacks=ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1))
trainer.fit(Net(), data, data, ckpt_path=sys.argv[2] if len(sys.argv) > 2 else None)
"""


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """What the script writes to a pseudo-terminal, without its colours."""
    ours, theirs = os.openpty()
    base = {key: value for key, value in os.environ.items() if key != "CI"}
    place = {**base, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "COLUMNS": "100", **environment}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], stdout=theirs, env=place)
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # the end of a terminal whose other side is closed
        while part := os.read(ours, 65536):
            text += part
    os.close(ours)
    assert process.wait() == 0
    return plain(text.decode())


def test_a_real_terminal_shows_training_with_the_validation_under_it(tmp_path: Path) -> None:
    shown = on_a_terminal(str(tmp_path))
    for words in ("Sanity check ", "Epoch 0/1 ━", "  Validation ━", "Epoch 1/1 ━", "written by the user\r\n", "loss: "):
        assert words in shown, words
    assert re.search(r"Epoch 1/1 ━+ 6/6 .* val: \S+\s*$", shown.rstrip())  # stays when the run has ended


def test_a_build_log_stays_clean_and_a_run_that_goes_on_inside_an_epoch_begins_there(tmp_path: Path) -> None:
    assert on_a_terminal(str(tmp_path), CI="1") == "written by the user\r\n" * 2
    shown = on_a_terminal(str(tmp_path / "more"), str(tmp_path / "step=9.ckpt"))
    assert "Sanity" not in shown and "Epoch 0/1" not in shown
    assert re.findall(r"Epoch 1/1 .*? (\d)/6", shown)[0] in "34"
