"""Signals set flags; the loop acts on them at a step boundary. Nothing else happens inside a handler."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class SignalFlags:
    """Watches SIGTERM, SIGUSR1 (SLURM's warning) and any others named, for the duration of a run.

    The first signal sets a flag. A second one of the same kind ends the process at once.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGUSR1)) -> None:
        self._signals = signals
        self._previous: dict[int, Any] = {}
        self.received: list[int] = []

    @property
    def sigterm(self) -> bool:
        return bool(self.received)

    def __enter__(self) -> SignalFlags:
        self.received = []
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received.append(number)
