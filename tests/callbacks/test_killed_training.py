"""A process that is killed outright and started again ends with the weights of one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(folder: Path, job: str, kill_at: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(HERE / "killed_training.py"), str(folder), job, str(kill_at)]
    place = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)])}
    return subprocess.run(command, env=place, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("job", ["averaging", "finetuning"])
def test_killed_and_started_again(job: str, tmp_path: Path) -> None:
    killed = run(tmp_path / "killed", job, 14)  # two steps after a save, in the third epoch
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed, whole = run(tmp_path / "killed", job, -1), run(tmp_path / "whole", job, -1)
    assert resumed.returncode == whole.returncode == 0, resumed.stderr
    assert resumed.stdout == whole.stdout != ""
