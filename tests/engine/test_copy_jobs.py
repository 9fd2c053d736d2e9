"""Copying by several threads: whoever waits for it, or is interrupted while it does, leaves nobody copying."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from milepost.engine.copy_jobs import Copying, Job


class Interrupts:
    """Raises in the main thread, as Ctrl-C does, while another thread is inside of a copy."""

    def __init__(self) -> None:
        self.inside, self.go = threading.Event(), threading.Event()
        self.copied: list[int] = []

    def copy(self, start: int, stop: int, address: int) -> None:
        if threading.current_thread() is threading.main_thread():
            assert self.inside.wait(30)
            threading.Timer(0.05, self.go.set).start()
            raise KeyboardInterrupt
        self.inside.set()
        assert self.go.wait(30)
        self.copied.append(start)


def test_an_interrupt_waits_for_the_copies_that_others_make_and_begins_no_more() -> None:
    source = Interrupts()
    jobs: list[Job] = [(source, number, number + 1, 0) for number in range(100)]
    copying = Copying(jobs)
    with ThreadPoolExecutor(1) as threads:
        copying.begin(threads, 1)
        with pytest.raises(KeyboardInterrupt):
            copying.join()
        assert len(source.copied) == 1, "the one under way has ended, and no other was begun"


def test_what_a_copy_fails_with_is_raised_once_all_have_ended() -> None:
    class Fails:
        def copy(self, start: int, stop: int, address: int) -> None:
            if start == 3:
                raise OSError("bad memory")

    copying = Copying([(Fails(), number, number + 1, 0) for number in range(5)])
    with ThreadPoolExecutor(2) as threads:
        copying.begin(threads, 2)
        with pytest.raises(OSError, match="bad memory"):
            copying.join()
    assert isinstance(copying.future.exception(), OSError)
