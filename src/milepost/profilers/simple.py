"""Count and time the actions of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from milepost import _distributed
from milepost.errors import MisconfigurationException
from milepost.profilers.profiler import Profiler


class SimpleProfiler(Profiler):
    """Sums up how often each action ran and how long it took, by the wall clock.

    Work that was only queued on an accelerator is counted where the run waits for it.

    Args:
        dirpath: folder of the report; the working directory if only `filename` is given.
        filename: the report goes to ``filename.txt``; printed if None.
        clock: seconds, from any origin.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.dirpath = dirpath
        self.filename = filename
        self._clock = clock
        self._running: dict[str, float] = {}
        self.recorded_durations: dict[str, list[float]] = {}

    def start(self, action_name: str) -> None:
        """Raises MisconfigurationException if the action already runs."""
        if action_name in self._running:
            raise MisconfigurationException(f"the action {action_name!r} has begun already: stop it first")
        self._running[action_name] = self._clock()

    def stop(self, action_name: str) -> None:
        """Raises MisconfigurationException if the action does not run."""
        if action_name not in self._running:
            raise MisconfigurationException(f"the action {action_name!r} has not begun: start it first")
        seconds = self._clock() - self._running.pop(action_name)
        self.recorded_durations.setdefault(action_name, []).append(seconds)

    def summary(self) -> str:
        """A table of the actions, longest total first, times in seconds."""
        rows = sorted(self.recorded_durations.items(), key=lambda item: -sum(item[1]))
        width = max((len(name) for name, _ in rows), default=6)
        lines = [f"{'Action':<{width}}  {'Mean (s)':>12}  {'Calls':>8}  {'Total (s)':>12}"]
        for name, seconds in rows:
            total = sum(seconds)
            lines.append(f"{name:<{width}}  {total / len(seconds):>12.5g}  {len(seconds):>8}  {total:>12.5g}")
        return "\n".join(lines) + "\n"

    def describe(self) -> None:
        """Print the summary or write it to the file, on rank 0."""
        if _distributed.rank() != 0:
            return
        if self.filename is None:
            print(self.summary())
            return
        directory = Path(self.dirpath or ".")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{self.filename}.txt").write_text(self.summary())
