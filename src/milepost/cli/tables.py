"""Text for people: tables, sizes, times, and names that can do no harm to a terminal."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TextIO


def safe(text: str) -> str:
    """`text` with control characters and other unprintable ones written out: no escape sequence reaches a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def columns(out: TextIO) -> int | None:
    """How wide the terminal is that `out` writes to; None where it is none: what goes to a file is not shortened."""
    try:
        return os.get_terminal_size(out.fileno()).columns or None
    except (OSError, ValueError):  # a pipe or a file; no descriptor at all
        return None


def shortened(text: str, width: int | None) -> str:
    """`text` in at most `width` characters. The middle gives way: names differ in how they begin and end."""
    if width is None or len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}" if width > 1 else "…"[:width]


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = (), width: int | None = None
) -> str:
    """Columns aligned by spaces; those numbered in `right` to the right. In `width`, the widest columns give way."""
    cells = [list(header), *([safe(cell) for cell in row] for row in rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(header))]
    if width is not None:
        widths = _narrowed(widths, width - 2 * (len(widths) - 1))
        cells = [[shortened(cell, widths[n]) for n, cell in enumerate(row)] for row in cells]
    lines = [
        "  ".join(
            cell.rjust(each) if n in right else cell.ljust(each)
            for n, (cell, each) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def _narrowed(widths: list[int], room: int) -> list[int]:
    """`widths` that take no more than `room` in all: the widest are cut to one width. None below `_NARROWEST`."""
    limit = max(widths, default=0)
    while limit > _NARROWEST and sum(min(width, limit) for width in widths) > room:
        limit -= 1
    return [min(width, limit) for width in widths]


_NARROWEST = 12


def size(count: int) -> str:
    """Bytes in units of 1000."""
    number = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def number(value: float | int | None) -> str:
    return "" if value is None else f"{value:.6g}"
