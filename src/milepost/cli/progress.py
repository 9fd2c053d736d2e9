"""A bar for work that takes long: on a terminal's standard error, and nowhere else."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from milepost.cli import tables

_EVERY_SECONDS = 0.2
_WIDTH = 24


class Bar:
    """How many of so many bytes have been read and written, as the kernel counts them for this process.

    So no reader or writer has to tell of its progress, and threads that read past the page cache count too. Where there
    is no such count, the bar stays at its start.
    """

    def __init__(self, what: str, total_bytes: int, out: TextIO, counters: Path = Path("/proc/self/io")) -> None:
        self._what = tables.safe(what)
        self._total = max(total_bytes, 1)
        self._out = out
        self._counters = counters
        self._first = self._counted()

    def draw(self) -> None:
        share = min((self._counted() - self._first) / self._total, 1.0)
        filled = round(share * _WIDTH)
        text = f"{'█' * filled}{'░' * (_WIDTH - filled)} {share:4.0%} of {tables.size(self._total)}  {self._what}"
        self._out.write(f"\r{tables.shortened(text, tables.columns(self._out))}\033[K")
        self._out.flush()

    def clear(self) -> None:
        self._out.write("\r\033[K")
        self._out.flush()

    def _counted(self) -> int:
        try:
            lines = dict(line.split(": ") for line in self._counters.read_text().splitlines())
            return int(lines["rchar"]) + int(lines["wchar"])
        except (OSError, ValueError, KeyError):
            return 0


@contextmanager
def shown(what: str, total_bytes: int, *, quiet: bool = False) -> Iterator[None]:
    """Show a bar while the block reads and writes `total_bytes`; nothing where it is `quiet`, or in a pipe."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    bar, done = Bar(what, total_bytes, sys.stderr), threading.Event()
    bar.draw()

    def redraw() -> None:
        while not done.wait(_EVERY_SECONDS):
            bar.draw()

    thread = threading.Thread(target=redraw, name="milepost-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        bar.clear()
