"""What the Trainer asks of a profiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Profiler:
    """Derive from this and override `start`, `stop` and `summary`."""

    def start(self, action_name: str) -> None:
        """An action begins, such as ``"training_step"``. Actions of different names may nest."""

    def stop(self, action_name: str) -> None:
        """The action ends."""

    def summary(self) -> str:
        """What was found, as text."""
        return ""

    def describe(self) -> None:
        """Report the summary. The Trainer calls this when the run ends."""

    @contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        """Profile the block, one that raises too."""
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)


class PassThroughProfiler(Profiler):
    """Measures nothing and costs nothing. The Trainer's default."""
