"""Under torch's elastic launcher a run of two ranks outlives their deaths, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import killed_ranks
import pytest


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_no_trace(tmp_path: Path) -> None:
    command = [sys.executable, killed_ranks.__file__, "--kills", "10", "--seed", "3", "--folder", str(tmp_path)]
    done = subprocess.run(command, check=False, timeout=900, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("10 kills of 10") and "the same bits" in done.stdout
    left = [path.name for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")]
    assert left == [], "what the dead were writing has been swept"
