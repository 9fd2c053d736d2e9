"""Text for people: tables, sizes, times, and names that can do no harm to a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence


def safe(text: str) -> str:
    """`text` with control characters and other unprintable ones written out: no escape sequence reaches a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns aligned by spaces; those numbered in `right` to the right."""
    cells = [list(header), *([safe(cell) for cell in row] for row in rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if n in right else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


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
