"""A process that is killed outright and started again ends with the weights of one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from killed_training import train

HERE = Path(__file__).parent


def test_killed_and_started_again(tmp_path: Path) -> None:
    """With a backbone that is unfrozen in epoch 1 and weights that are averaged from epoch 2 on."""

    def run(kill_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(HERE / "killed_training.py"), str(tmp_path / "killed"), str(kill_at)]
        place = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)])}
        return subprocess.run(command, env=place, capture_output=True, text=True, check=False)

    killed = run(14)  # two steps after a save, in the third epoch
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(-1)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.strip() == train(tmp_path / "whole")
