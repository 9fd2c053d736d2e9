"""Which functions the actions of a run spend their time in."""

from __future__ import annotations

import cProfile
import io
import os
import pstats

from milepost.errors import MisconfigurationException
from milepost.profilers.profiler import Profiler


class AdvancedProfiler(Profiler):
    """Profiles each action with Python's cProfile. Slows the run down, and says much.

    Only one action is measured at a time: while an action runs inside another, the inner one is, and the outer one goes
    on afterwards.

    Args:
        dirpath: folder of the report; the run's ``trainer.log_dir`` if None.
        filename: the report goes to ``STAGE-filename.txt``; printed if None.
        line_count_restriction: functions to report of each action: a count (int), or a fraction of them (float).
        dump_stats: also write each action's ``STAGE-filename-ACTION.prof``, which ``pstats`` and viewers read.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        line_count_restriction: float = 1.0,
        dump_stats: bool = False,
    ) -> None:
        super().__init__(dirpath, filename)
        self.line_count_restriction = line_count_restriction
        self.dump_stats = dump_stats
        self.profiled_actions: dict[str, cProfile.Profile] = {}
        self._running: list[str] = []

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | os.PathLike[str] | None = None) -> None:
        super().setup(stage, local_rank, log_dir)
        self.profiled_actions, self._running = {}, []

    def start(self, action_name: str) -> None:
        if self._running:
            self.profiled_actions[self._running[-1]].disable()  # Python runs one cProfile at a time
        self._running.append(action_name)
        self.profiled_actions.setdefault(action_name, cProfile.Profile()).enable()

    def stop(self, action_name: str) -> None:
        """Raises MisconfigurationException if the action does not run."""
        if action_name not in self._running:
            raise MisconfigurationException(f"the action {action_name!r} has not begun: start it first")
        self.profiled_actions[self._running[-1]].disable()
        self._running.reverse()
        self._running.remove(action_name)  # the innermost of that name
        self._running.reverse()
        if self._running:
            self.profiled_actions[self._running[-1]].enable()

    def summary(self) -> str:
        """For each action its functions, longest time with all that they called first."""
        parts = [self._title()] if self.profiled_actions else []
        for name, profile in self.profiled_actions.items():
            text = io.StringIO()
            pstats.Stats(profile, stream=text).strip_dirs().sort_stats("cumulative").print_stats(
                self.line_count_restriction
            )
            parts.append(f"Profile stats for: {name}\n{text.getvalue()}")
        return "\n".join(parts)

    def describe(self) -> None:
        super().describe()
        if self.dump_stats:
            for name, profile in self.profiled_actions.items():
                profile.dump_stats(self._path(".prof", name))

    def __getstate__(self) -> dict[str, object]:
        """Copied or sent to another process without what was recorded, which cannot be."""
        return {**self.__dict__, "profiled_actions": {}, "_running": []}
