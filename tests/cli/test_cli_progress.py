"""The bar of long work: on a terminal alone, and as far as the kernel has counted."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from milepost.cli import tables
from milepost.cli.progress import Bar
from milepost.plugins import SnapshotCheckpointIO, TorchCheckpointIO


def test_the_bar_shows_what_this_process_has_read_and_written(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(1 << 20))
    out = io.StringIO()
    bar = Bar("reading", 4 << 20, out)
    bar.draw()
    assert f"{out.getvalue().split('%')[0][-2:].strip()}" == "0"
    with (tmp_path / "data").open("rb", buffering=0) as file:
        for _ in range(2):
            file.seek(0)
            assert len(file.read()) == 1 << 20
    bar.draw()
    assert " 50% of 4.2 MB  reading" in out.getvalue()
    for _ in range(3):
        (tmp_path / "other").write_bytes(bytes(1 << 20))
    bar.draw()
    assert "100% of" in out.getvalue()
    bar.clear()
    assert out.getvalue().endswith("\r\033[K")


def test_where_the_kernel_does_not_count_the_bar_stays_at_its_start(tmp_path: Path) -> None:
    out = io.StringIO()
    Bar("reading", 100, out, counters=tmp_path / "missing").draw()
    assert "  0% of" in out.getvalue()


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    for step in (1, 2):
        state = {"global_step": step, "state_dict": {"w": torch.full((1000,), float(step))}}
        TorchCheckpointIO().save_checkpoint(state, tmp_path / f"{step}.ckpt")
        SnapshotCheckpointIO(background=False).save_checkpoint(state, tmp_path / f"step-{step}")
    return tmp_path


COMMANDS = {
    "verify": (["verify", "."], 0), "diff": (["diff", "1.ckpt", "step-2"], 1),
    "prune": (["prune", ".", "--keep-newest", "1"], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_terminal_gets_a_bar_and_neither_pipes_nor_programs_do(checkpoints: Path, name: str) -> None:
    arguments, status = COMMANDS[name]
    on_terminal, out = run(arguments, checkpoints, status)
    assert "% of" in on_terminal and on_terminal.endswith("\033[K")
    as_json, out_of_json = run([*arguments, "--json"], checkpoints, status)
    assert as_json == "" and out_of_json != out
    piped = subprocess.run(
        [sys.executable, "-m", "milepost", *arguments], cwd=checkpoints, capture_output=True, check=False
    )
    assert (piped.returncode, piped.stderr, piped.stdout) == (status, b"", out)


def test_converting_shows_reading_and_writing(checkpoints: Path) -> None:
    shown, _ = run(["convert", "1.ckpt", "made"], checkpoints, 0)
    assert "reading 1.ckpt" in shown and "writing made" in shown


def run(arguments: list[str], folder: Path, status: int) -> tuple[str, bytes]:
    """What a command writes to a terminal as standard error, and to a pipe as standard output."""
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "milepost", *arguments],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=theirs,
            check=False,
        )
        assert done.returncode == status
        os.write(theirs, b"|")  # so that there is something to read where nothing was shown
        shown = b""
        while not shown.endswith(b"|"):
            shown += os.read(ours, 1 << 16)
    finally:
        os.close(ours)
        os.close(theirs)
    return shown.decode().removesuffix("|"), done.stdout


def test_tables_fit_the_terminal_and_keep_both_ends_of_a_name() -> None:
    key = "callbacks.ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min', 'every_n_train_steps': 0}.best_model_path"
    rows = [[key, "F32", "[3]"], ["state_dict.w", "BF16", "[1000, 20]"]]
    wide = tables.table(["2 tensors", "type", "shape"], rows)
    assert key in wide
    narrow = tables.table(["2 tensors", "type", "shape"], rows, width=60)
    lines = narrow.splitlines()
    assert max(map(len, lines)) <= 60 and len(lines) == 3
    assert lines[1].startswith("callbacks.Model") and "best_model_path  F32" in lines[1] and "…" in lines[1]
    assert lines[2].startswith("state_dict.w ") and lines[2].endswith("[1000, 20]")
    assert tables.table(["2 tensors", "type", "shape"], rows, width=500) == wide
    assert tables.shortened("abcdefgh", 5) == "ab…gh" and tables.shortened("abc", 1) == "…"


def test_what_goes_to_a_file_is_not_shortened(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        assert tables.columns(file) is None
    assert tables.columns(io.StringIO()) is None
