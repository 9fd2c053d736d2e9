"""Count and time the actions of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from milepost.errors import MisconfigurationException
from milepost.profilers.profiler import Profiler


class SimpleProfiler(Profiler):
    """Sums up how often each action ran and how long it took, by the wall clock.

    Work that was only queued on an accelerator is counted where the run waits for it. The time of an action holds that
    of the actions inside it, so the percentages do not add up to 100.

    Args:
        dirpath: folder of the report; the run's ``trainer.log_dir`` if None.
        filename: the report goes to ``STAGE-filename.txt``; printed if None.
        extended: report calls and percentages too.
        clock: seconds, from any origin.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        extended: bool = True,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(dirpath, filename)
        self.extended = extended
        self._clock = clock
        self._begin()

    def _begin(self) -> None:
        self._running: dict[str, float] = {}
        self.recorded_durations: dict[str, list[float]] = {}
        self._begun = self._clock()

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | os.PathLike[str] | None = None) -> None:
        super().setup(stage, local_rank, log_dir)
        self._begin()

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
        whole = self._clock() - self._begun
        rows: list[tuple[str, ...]] = [("Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %")]
        calls = sum(map(len, self.recorded_durations.values()))
        rows.append(("Total", "-", str(calls), f"{whole:.5g}", "100"))
        for name, seconds in sorted(self.recorded_durations.items(), key=lambda item: -sum(item[1])):
            total = sum(seconds)
            share = f"{100 * total / whole:.2f}" if whole else "-"
            rows.append((name, f"{total / len(seconds):.5g}", str(len(seconds)), f"{total:.5g}", share))
        if not self.extended:
            rows = [(row[0], row[1], row[3]) for row in rows]
        return self._title() + _table(rows)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join([rule, lines[0], rule, *lines[1:], rule]) + "\n"
