"""The plain loop on real text, killed by SIGKILL between two checkpoints, ends with the weights of an unbroken run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def command(folder: Path) -> list[str]:
    program = ROOT / "examples" / "characters" / "train.py"
    return [sys.executable, str(program), "--steps", "60", "--every", "10", "--folder", str(folder)]


def finish(folder: Path) -> list[str]:
    done = subprocess.run(command(folder), env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_killed_and_resumed_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = finish(tmp_path / "whole")
    with subprocess.Popen(command(tmp_path / "cut"), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step    40"):
                process.kill()
                break
    again = finish(tmp_path / "cut")
    assert again[0] in ("starting at step 31", "starting at step 41"), again  # the save of step 40 may be under way
    assert again[1:] == whole[-len(again) + 1 :] and again[-1].startswith("weights ")
    assert len(list((tmp_path / "cut").iterdir())) <= 4, "the two newest, the best, and the one restored"


def test_it_is_short_enough_to_read() -> None:
    assert len((ROOT / "examples" / "characters" / "train.py").read_text().splitlines()) < 120
