"""All that one snapshot copies: at once or later, by threads of the host or by a device."""

from __future__ import annotations

import threading
from concurrent.futures import Executor, Future

import torch

from milepost.engine.copy_jobs import Copies, Copying, Job
from milepost.engine.device import Device, Fence, Transfer
from milepost.engine.lazy import Watch

_WORTH_A_THREAD_BYTES = 1 << 20  # less is copied before another thread has woken up
_SPLIT_BYTES = 8 << 20  # larger tensors are copied by several threads

Watched = tuple[str, torch.Tensor, int]
"""The name of a tensor that is copied later, the tensor, and the address that it is copied to."""


class Batch:
    """Collects copies, and makes them.

    Args:
        device: what copies the tensors that it takes.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.bytes = 0
        self._jobs: dict[bool, list[Job]] = {False: [], True: []}  # by whether they can wait
        self._transfers: dict[bool, list[Transfer]] = {False: [], True: []}
        self._watched: dict[bool, list[Watched]] = {False: [], True: []}  # by whether they are the device's

    @property
    def on_device(self) -> bool:
        """Whether a device copies something of it."""
        return bool(self._transfers[False] or self._transfers[True])

    def by_host(self, source: Copies, start: int, stop: int, address: int, waits: bool) -> None:
        """Copy a range of `source`. `address` is where its very beginning goes, or would."""
        self.bytes += stop - start
        self._jobs[waits] += [
            (source, begin, min(begin + _SPLIT_BYTES, stop), address + begin)
            for begin in range(start, stop, _SPLIT_BYTES)
        ]

    def by_device(self, tensor: torch.Tensor, address: int, waits: bool) -> None:
        """Copy a tensor that the device takes."""
        self.bytes += tensor.nbytes
        self._transfers[waits].append(Transfer(tensor, address))

    def watch(self, name: str, tensor: torch.Tensor, address: int, of_device: bool) -> None:
        """Find out whether somebody writes to a tensor that waits."""
        self._watched[of_device].append((name, tensor, address))

    def run(self, memory: object, threads: Executor, workers: int) -> Staging | None:
        """Copy what does not wait, and begin the rest, which keeps `memory`. None where there is none."""
        now, then = self._jobs[False], self._jobs[True]
        watches = {of_device: _watch(watched) for of_device, watched in self._watched.items()}
        first = self.device.begin(self._transfers[False]) if self._transfers[False] else None
        copying = Copying(now)
        if sum(stop - start for _, start, stop, _ in now) >= _WORTH_A_THREAD_BYTES:
            copying.begin(threads, workers - 1)
        copying.join()
        if first is not None:
            first.wait()
        if not then and not self._transfers[True]:
            return None
        fence = self.device.begin(self._transfers[True]) if self._transfers[True] else None
        places = {of_device: [place for _, _, place in watched] for of_device, watched in self._watched.items()}
        rest = Copying(then, lambda: watches[False].violation(places[False]), memory)
        rest.begin(threads, workers)
        if not then:
            rest.join()
        return Staging(rest.future, fence, watches[True], places[True])


def _watch(watched: list[Watched]) -> Watch:
    return Watch([(name, tensor) for name, tensor, _ in watched])


class Staging:
    """What a save is still copying.

    Args:
        future: ends when the host has copied its part.
        fence: the device's part; `watch` and `places`: its tensors, and where they are copied to.
    """

    def __init__(
        self,
        future: Future[None],
        fence: Fence | None = None,
        watch: Watch | None = None,
        places: list[int] | None = None,
    ) -> None:
        self._future = future
        self._fence = fence
        self._watch = watch
        self._places = places or []
        self._written: list[str] | None = None
        self._lock = threading.Lock()

    def hold(self) -> None:
        """Make sure that a step which begins after this does not reach the copy. Waits for the host's part only."""
        self._future.exception()
        if self._fence is not None:
            self._look()
            self._fence.hold()

    def done(self) -> bool:
        """Whether the host's part has ended. Never blocks."""
        return self._future.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end of all; what it failed with, or None.

        Raises:
            TimeoutError: the host's part has not ended within `timeout` seconds.
        """
        error = self._future.exception(timeout)
        if self._fence is None or self._watch is None:
            return error
        self._fence.wait()
        return error or self._watch.violation(self._places, self._look())

    def result(self) -> None:
        """Wait for the end of all. Raises what it failed with."""
        if (error := self.exception()) is not None:
            raise error

    def _look(self) -> list[str]:
        """What was written to before the next step: the first who asks comes before it."""
        with self._lock:
            if self._written is None:
                self._written = [] if self._watch is None else self._watch.written()
            return self._written
