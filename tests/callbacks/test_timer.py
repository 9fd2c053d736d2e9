"""Timer: the time before a restart counts."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from milepost.callbacks import Timer
from milepost.errors import MisconfigurationException


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def trainer() -> Any:
    return SimpleNamespace(should_stop=False, is_global_zero=True)


MODULE: Any = None


def test_stops_when_the_time_is_up(capsys: pytest.CaptureFixture[str]) -> None:
    clock, t = Clock(), trainer()
    timer = Timer({"seconds": 10}, clock=clock)
    timer.on_train_start(t, MODULE)
    clock.now += 9
    timer.on_train_batch_end(t, MODULE, None, None, 0)
    assert not t.should_stop and timer.time_remaining() == 1
    clock.now += 1
    timer.on_train_epoch_end(t, MODULE)
    assert not t.should_stop  # it looks at each step, not at each epoch
    timer.on_train_batch_end(t, MODULE, None, None, 1)
    assert t.should_stop and "Time limit" in capsys.readouterr().out


def test_a_restart_goes_on_counting() -> None:
    clock, t = Clock(), trainer()
    first = Timer(timedelta(seconds=10), clock=clock)
    first.on_train_start(t, MODULE)
    clock.now += 7
    state = first.state_dict()  # saved in the midst of training
    clock.now += 50  # the machine is away
    second = Timer(timedelta(seconds=10), clock=clock)
    second.load_state_dict(state)
    assert second.state_dict() == state
    second.on_fit_start(t, MODULE)
    second.on_train_start(t, MODULE)
    clock.now += 3
    second.on_train_batch_end(t, MODULE, None, None, 0)
    assert t.should_stop and second.time_elapsed() == 10
    third = Timer(timedelta(seconds=10), clock=clock)
    third.load_state_dict(second.state_dict())
    t.should_stop = False
    third.on_fit_start(t, MODULE)
    assert t.should_stop  # nothing was left to begin with


def test_stages_are_measured_apart_and_add_up() -> None:
    clock, timer = Clock(), None
    timer = Timer(clock=clock)
    for _ in range(2):
        timer.on_validation_start(trainer(), MODULE)
        clock.now += 2
        timer.on_validation_end(trainer(), MODULE)
        clock.now += 5
    assert timer.time_elapsed("validate") == 4 and timer.time_elapsed("train") == 0
    assert timer.time_remaining() is None and timer.end_time("validate") == 109


@pytest.mark.parametrize(("text", "seconds"), [("01:02:03:04", 93784.0), ("00:00:00:05", 5.0)])
def test_duration_as_text(text: str, seconds: float) -> None:
    assert Timer(text).time_remaining() == seconds


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="12 hours"):
        Timer("12 hours")
    with pytest.raises(MisconfigurationException, match="batch"):
        Timer(interval="batch")
