"""What a rank and the store do to each other while ranks meet: the store fails, or does not answer."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from milepost.engine.votes import Outcome, Ranks


class Shaky:
    """A store as it is, but for what `before` does to a call, which is given its name and its arguments."""

    def __init__(self, store: Any, before: Callable[[str, tuple[Any, ...]], None]) -> None:
        self._store = store
        self.before = before

    def clone(self) -> Shaky:
        self.before("clone", ())
        return self

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.before(name, arguments)
            return getattr(self._store, name)(*arguments)

        return call


def test_a_rank_that_has_heard_of_the_commit_reports_it_though_the_store_ends_then() -> None:
    def gone(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "add" and arguments[0].endswith("/left"):
            raise dist.DistNetworkError("connection reset by peer")

    store = Shaky(dist.HashStore(), gone)
    first, second = (Ranks(store, rank, 2, deadline_seconds=5) for rank in range(2))  # type: ignore[arg-type]
    meeting = first.meeting("save")
    meeting.announce(Outcome())
    second.meeting("save").outcome()
    first.meeting("busy").decided(True)
    assert second.meeting("busy").decided(False)


def test_the_pulse_asks_for_nothing_once_the_rank_has_left() -> None:
    """The keys may be gone then, and to get one that is gone blocks."""
    asked: list[str] = []

    def note(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "check":
            asked.extend(arguments[0])

    ranks = Ranks(Shaky(dist.HashStore(), note), 1, 2, deadline_seconds=5)  # type: ignore[arg-type]
    meeting = ranks.meeting("save")
    turns: list[int] = []
    looked = threading.Event()

    def progress() -> int:
        if turns:
            turns.append(1)
            if len(turns) == 4:  # two whole turns since it has left
                looked.set()
        return 0

    with meeting.pulse(progress, lambda why: None):
        meeting.leave()
        before = len(asked)
        turns.append(0)
        assert looked.wait(20)
    assert len(asked) == before


def test_a_store_that_answers_again_is_asked_by_the_next_save_under_the_same_place() -> None:
    answers = threading.Event()
    answers.set()
    store = Shaky(dist.HashStore(), lambda name, arguments: answers.wait(20) and None)
    ranks = Ranks(store, 0, 1, deadline_seconds=20)  # type: ignore[arg-type]
    first = ranks.meeting("save")
    first.say("one", 1)
    (thread,) = _threads()
    place = ranks._place
    answers.clear()
    ranks.deadline_seconds = 0.1
    with pytest.raises(TimeoutError, match="has not answered for"):
        first.say("two", 2)
    with pytest.raises(TimeoutError, match="has stopped answering"):
        first.say("three", 3)
    answers.set()
    thread.join(20)
    assert not thread.is_alive(), "it ends, and its connection with it"
    ranks.deadline_seconds = 20
    second = ranks.meeting("save")
    second.say("four", 4)
    assert second.hear("four", int) == 4
    assert ranks._place == place and store.add(f"{place.rpartition('/')[0]}/ranks", 0) == 1
    (thread,) = _threads()
    del ranks, first, second
    gc.collect()
    thread.join(20)
    assert not thread.is_alive(), "it ends with the ranks that it was made for"


def test_a_slow_first_connection_holds_nobody_up_who_only_begins_a_save() -> None:
    connects, connecting = threading.Event(), threading.Event()

    def slow(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "clone":
            connecting.set()
            assert connects.wait(20)

    ranks = Ranks(Shaky(dist.HashStore(), slow), 0, 1, deadline_seconds=20)  # type: ignore[arg-type]
    saving = threading.Thread(target=ranks.meeting("save").say, args=("one", 1))
    saving.start()
    assert connecting.wait(20)
    beginning = threading.Thread(target=ranks.meeting, args=("another save",), daemon=True)
    beginning.start()
    beginning.join(10)
    held_up = beginning.is_alive()
    connects.set()
    saving.join(20)
    assert not held_up and not saving.is_alive()


def _threads() -> list[threading.Thread]:
    """Those that serve ranks which this test has made: others have ended, or serve those of other tests."""
    return [thread for thread in threading.enumerate() if thread.name == "milepost-votes" and thread not in _before]


_before: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def _know_the_threads_before() -> None:
    _before.clear()
    _before.update(threading.enumerate())
