"""Copying by several threads at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Protocol


class Copies(Protocol):
    """Where bytes come from."""

    def copy(self, start: int, stop: int, address: int) -> None:
        """Copy the bytes of a range to `address`."""


Job = tuple[Copies, int, int, int]
"""From where, the range, and the address."""


class Copying:
    """Jobs that several threads take from one queue, so that none idles.

    Args:
        check: called by the thread that ends last; what it returns is what the copying failed with.
        memory: what is copied to; it is kept until the end.
    """

    def __init__(
        self, jobs: Sequence[Job], check: Callable[[], Exception | None] | None = None, memory: object = None
    ) -> None:
        self._memory = memory
        self.future: Future[None] = Future()
        self._jobs = deque(jobs)
        self._check = check
        self._lock = threading.Lock()
        self._working = 0
        self._ended = False
        self._error: BaseException | None = None

    def begin(self, threads: Executor, count: int) -> None:
        """Have up to `count` threads copy."""
        for _ in range(min(count, len(self._jobs))):
            threads.submit(self._work)

    def join(self) -> None:
        """Copy with them, and wait for the end: when this returns or raises, nobody copies any more.

        Raises:
            BaseException: what the copying failed with, or interrupted it.
        """
        try:
            self._work()
            self.future.result()
        except BaseException:
            self._jobs.clear()
            self.future.exception()
            raise

    def _work(self) -> None:
        with self._lock:  # a thread that comes when all is done is not waited for
            if self._ended:
                return
            self._working += 1
        try:
            while True:
                try:
                    source, start, stop, address = self._jobs.popleft()
                except IndexError:
                    break
                source.copy(start, stop, address)
        except BaseException as error:
            self._jobs.clear()
            self._error = error
        with self._lock:
            self._working -= 1
            last = self._ended = self._working == 0
        if last:
            self._end()

    def _end(self) -> None:
        check, self._check = self._check, None  # it holds tensors
        self._memory = None
        error = self._error
        if error is None and check is not None:
            try:
                error = check()
            except BaseException as failed:
                error = failed
        if error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(error)
