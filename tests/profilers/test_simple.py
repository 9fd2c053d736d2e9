"""SimpleProfiler counts and times, of blocks that raise too."""

from __future__ import annotations

from pathlib import Path

import pytest

from milepost.errors import MisconfigurationException
from milepost.profilers import PassThroughProfiler, SimpleProfiler


def test_times_are_summed_and_reported(tmp_path: Path) -> None:
    ticks = iter([0.0, 0.0, 1.0, 1.0, 4.0, 4.0, 4.5, 5.0])
    profiler = SimpleProfiler(tmp_path, "report", clock=lambda: next(ticks))
    for action in ("step", "step", "save"):
        with profiler.profile(action):
            pass
    assert profiler.recorded_durations == {"step": [1.0, 3.0], "save": [0.5]}
    profiler.describe()
    lines = (tmp_path / "report.txt").read_text().splitlines()
    assert [line.split() for line in lines if line[0] in "sT"] == [
        ["Total", "-", "3", "5", "100"], ["step", "2", "2", "4", "80.00"], ["save", "0.5", "1", "0.5", "10.00"],
    ]  # fmt: skip


def test_the_short_form_has_no_counts() -> None:
    profiler = SimpleProfiler(extended=False)
    with profiler.profile("step"):
        pass
    assert "Mean duration" in profiler.summary() and "Num calls" not in profiler.summary()


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
