"""The threads that write: none of them outlives what it writes to."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from milepost.engine.memory import Memory
from milepost.engine.writer import BlobWriting, Workers
from milepost.storage.store import LocalStore

LONG = 20  # seconds until a test that hangs fails


class Slow(LocalStore):
    """Writes once it is let; notes what happened in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.let = threading.Event(), threading.Event()
        self.log: list[str] = []

    def write(self, descriptor: int, data: memoryview, offset: int) -> None:
        self.entered.set()
        self.let.wait(LONG)
        super().write(descriptor, data, offset)
        self.log.append("written")

    def abandon(self, descriptor: int) -> None:
        self.log.append("closed")
        super().abandon(descriptor)


class Zeros:
    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = Memory(size)

    def view(self, start: int, stop: int, buffer: memoryview) -> memoryview:
        return self._memory.bytes[start:stop]


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_closes_no_file_that_a_thread_still_writes_to(tmp_path: Path) -> None:
    store, workers = Slow(), Workers(1)
    writing = BlobWriting(store, workers)

    def meanwhile() -> None:
        store.entered.wait(LONG)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
        writing._failed.wait(2)  # the caller is past the interrupt
        store.let.set()

    before = signal.signal(signal.SIGUSR2, interrupt)
    thread = threading.Thread(target=meanwhile)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            writing.run([(str(tmp_path / name), Zeros(8192)) for name in "ab"])
    finally:
        signal.signal(signal.SIGUSR2, before)
        thread.join()
        workers.close()
    assert store.log == ["written", "closed", "closed"], "the first file is written, the second one never begun"
