"""kill -9 at random moments of a saving loop: ``python tests/faults/killed_saver.py`` does it a thousand times."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from crash_scenarios import memory_directory
from killed_saver import trials


@pytest.mark.timeout(300)  # 200 processes, on however busy a machine
def test_nothing_is_torn_or_lost_by_kills_at_any_moment(tmp_path: Path) -> None:
    root = memory_directory(tmp_path)  # what a kill leaves is the same on every disk
    phases, saves = trials(root / "run", 200)
    shutil.rmtree(root)
    assert sum(phases.values()) == 200 and saves > 100
    assert all(phases[name] for name in ("staging", "writing", "commit", "removal")), phases
