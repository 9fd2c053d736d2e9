"""One line of a progress bar, as text. Pure: what to show and how wide it may be come from outside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.text import Text


@dataclass(frozen=True)
class RichProgressBarTheme:
    """Styles of the parts of the line, as rich spells them, and how metrics are written."""

    description: str = ""
    progress_bar: str = "#6206E0"
    progress_bar_finished: str = "#6206E0"
    progress_bar_pulse: str = "#6206E0"
    batch_progress: str = ""
    time: str = "dim"
    processing_speed: str = "dim underline"
    metrics: str = "italic"
    metrics_text_delimiter: str = " "
    metrics_format: str = ".4g"


@dataclass
class Progress:
    """How far one loop has come.

    Attributes:
        label: what runs, such as ``Epoch 2/9``.
        total: batches in all, infinite where that is not known.
        first: batches that another process had done when this one went on.
        begun: when this process began, in seconds by the caller's clock.
        paused: seconds since then that belong to another loop.
    """

    label: str
    total: int | float
    begun: float
    first: int = 0
    done: int = 0
    paused: float = 0.0
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def known(self) -> bool:
        return self.total > 0 and math.isfinite(self.total)

    def timing(self, now: float) -> tuple[float, float, float | None]:
        """Seconds so far, batches per second, and seconds to go where that can be told."""
        elapsed = max(now - self.begun - self.paused, 0.0)
        speed = (self.done - self.first) / elapsed if elapsed > 0 else 0.0
        return elapsed, speed, (self.total - self.done) / speed if self.known and speed > 0 else None

    def render(self, now: float, width: int, theme: RichProgressBarTheme) -> Text:
        """``Epoch 2/9 ━━━━━━━━━━  12/100 0:00:03 • 0:00:24 3.40it/s loss 0.123``; the bar gives way first."""
        elapsed, speed, left = self.timing(now)
        numbers = Text()
        numbers.append(f" {self.done}/{int(self.total) if self.known else '--'}", theme.batch_progress)
        numbers.append(f" {clock_time(elapsed)} • {'-:--:--' if left is None else clock_time(left)}", theme.time)
        numbers.append(" ").append(f"{speed:.2f}it/s", theme.processing_speed)
        delimiter = theme.metrics_text_delimiter
        shown = delimiter.join(f"{name}: {_spelled(v, theme.metrics_format)}" for name, v in self.metrics.items())
        if shown:
            numbers.append(" ").append(shown, theme.metrics)
        line = Text(self.label, theme.description, no_wrap=True, overflow="ellipsis")
        room = min(width - len(self.label) - len(numbers.plain) - 2, 40)
        if self.known and room >= 5:
            filled = room * self.done // int(self.total)
            style = theme.progress_bar_finished if self.done >= self.total else theme.progress_bar
            line.append(" ").append("━" * filled, style).append("─" * (room - filled), "dim")
        line.append_text(numbers)
        line.truncate(width, overflow="ellipsis")
        return line


def clock_time(seconds: float) -> str:
    """Whole seconds as ``h:mm:ss``."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _spelled(value: Any, form: str) -> str:
    if isinstance(value, torch.Tensor):
        value = value.item()
    return format(value, form) if isinstance(value, float) else str(value)
