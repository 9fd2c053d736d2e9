"""SimpleProfiler counts and times, of blocks that raise too."""

from __future__ import annotations

from pathlib import Path

import pytest

from milepost.errors import MisconfigurationException
from milepost.profilers import PassThroughProfiler, SimpleProfiler


def test_times_are_summed_and_reported(tmp_path: Path) -> None:
    ticks = iter([0.0, 1.0, 1.0, 4.0, 4.0, 4.5])
    profiler = SimpleProfiler(tmp_path, "report", clock=lambda: next(ticks))
    for action in ("step", "step", "save"):
        with profiler.profile(action):
            pass
    assert profiler.recorded_durations == {"step": [1.0, 3.0], "save": [0.5]}
    profiler.describe()
    lines = (tmp_path / "report.txt").read_text().splitlines()
    assert [line.split() for line in lines[1:]] == [["step", "2", "2", "4"], ["save", "0.5", "1", "0.5"]]


def test_a_block_that_raises_is_recorded() -> None:
    profiler = SimpleProfiler()
    with pytest.raises(KeyError), profiler.profile("step"):
        raise KeyError
    assert len(profiler.recorded_durations["step"]) == 1


def test_misuse_is_refused() -> None:
    profiler = SimpleProfiler()
    profiler.start("a")
    with pytest.raises(MisconfigurationException, match="'a'"):
        profiler.start("a")
    with pytest.raises(MisconfigurationException, match="'b'"):
        profiler.stop("b")


def test_pass_through_reports_nothing() -> None:
    profiler = PassThroughProfiler()
    with profiler.profile("step"):
        pass
    assert profiler.summary() == ""
