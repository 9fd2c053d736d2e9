"""Copying what a buffer holds of a stored tensor to where it belongs in memory: whole runs, or boxes with strides."""

from __future__ import annotations

import ctypes
from typing import Any

from milepost.engine.requests import Destination
from milepost.format.regions import Steps


def copy_in(destination: Destination, begin: int, end: int, address: int) -> None:
    """Copy what the bytes `begin` to `end` of the file, which lie at `address`, hold for a destination."""
    start, stop, target, run, steps = destination
    if steps:
        _Copy(begin, end, address, run).part(start, target, steps)
        return
    low, high = max(begin, start), min(end, stop)
    if low < high:
        ctypes.memmove(target + low - start, address + low - begin, high - low)


class _Copy:
    """One buffer full of bytes, and the runs of a region that it holds."""

    def __init__(self, begin: int, end: int, address: int, run: int) -> None:
        self.begin = begin
        self.end = end
        self.address = address
        self.run = run

    def part(self, start: int, target: int, steps: Steps) -> None:
        """Copy the part of a region that begins at `start` in the file, and belongs at the address `target`.

        What lies in the buffer whole is copied at once; at its edges there is at most one row each that does not.
        """
        extent = self.run + sum((count - 1) * apart for count, apart, _ in steps)
        if start >= self.end or start + extent <= self.begin:
            return
        if start >= self.begin and start + extent <= self.end:
            self._whole(start, target, steps)
        elif not steps:
            low, high = max(self.begin, start), min(self.end, start + self.run)
            ctypes.memmove(target + low - start, self.address + low - self.begin, high - low)
        else:
            self._rows(start, target, steps, extent)

    def _rows(self, start: int, target: int, steps: Steps, extent: int) -> None:
        count, apart, beside = steps[0]
        inner = extent - (count - 1) * apart
        first = min(max(-(-(self.begin - start) // apart), 0), count)  # the first row that begins in the buffer
        after = min(max((self.end - start - inner) // apart + 1, 0), count)  # behind the last one that ends in it
        if first < after:
            self._whole(start + first * apart, target + first * beside, ((after - first, apart, beside), *steps[1:]))
        else:
            after = first
        for row in {first - 1, after}:
            if 0 <= row < count:
                self.part(start + row * apart, target + row * beside, steps[1:])

    def _whole(self, start: int, target: int, steps: Steps) -> None:
        source = self.address + start - self.begin
        if not steps:
            ctypes.memmove(target, source, self.run)
            return
        extent = self.run + sum((count - 1) * apart for count, apart, _ in steps)
        span = self.run + sum((count - 1) * beside for count, _, beside in steps)
        width = next(w for w in (8, 4, 2, 1) if all(n % w == 0 for n in (self.run, *(n for s in steps for n in s[1:]))))
        shape = [*(count for count, _, _ in steps), self.run // width]
        into = _array(target, span, width, shape, [beside for _, _, beside in steps])
        into[...] = _array(source, extent, width, shape, [apart for _, apart, _ in steps])


def _array(address: int, span: int, width: int, shape: list[int], strides: list[int]) -> Any:
    """Memory as an array of runs, in elements as wide as they and all distances allow: that copies fastest."""
    import numpy  # only where there is something to reshard: a listing does without

    memory: Any = (ctypes.c_char * span).from_address(address)
    return numpy.ndarray(shape, f"u{width}", memory, 0, [*strides, width])
