"""What a rank and the store do to each other while ranks meet: the store fails, or does not answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

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
