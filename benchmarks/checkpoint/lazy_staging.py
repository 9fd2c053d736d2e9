"""What a lazy save takes from the loop: `checkpoint_speed.py lazy` runs this.

A loop of steps of about a second, which train the parameters of GPT-2 small by AdamW, with a save every ten steps, next
to the same loop that never saves. Forward and backward are matrix products in their stead, by as many threads as torch
is given; the state is that of the other figures, 1.5 GB.
"""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from milepost import Checkpointer

STEPS = 10
_PIECE = 1 << 20


@dataclass
class Took:
    """Seconds of ten steps, and in `save`, by the clock and of the core that runs the loop; held back in steps."""

    loop: float
    loop_cpu: float
    save: float = 0.0
    save_cpu: float = 0.0
    held: float = 0.0


class Loop:
    """Ten steps at a time."""

    def __init__(self, weights: dict[str, torch.Tensor], folder: Path, seconds_each: float = 0.8) -> None:
        self.parameters = [torch.nn.Parameter(tensor) for tensor in weights.values()]
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, 1e-4)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.optimizer.step()
        self.state = {"model": dict(zip(weights, self.parameters, strict=True)), "optimizer": self.optimizer}
        self.checkpointer = Checkpointer(folder, lazy=True, threads=2)
        self.checkpointer.prepare(self.state)
        self._left = torch.randn(768, 768)
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < 1:
            self._left @ self._left
            count += 1
        self._products = int(count * seconds_each)  # the same work in every step, whatever else the machine does
        self.saves = 0

    def ten_steps(self, saving: bool) -> Took:
        gate = self.checkpointer._engine._gate
        held, begin, save = gate.held_seconds, time.perf_counter(), (0.0, 0.0)
        core = time.thread_time()
        for step in range(STEPS):
            for _ in range(self._products):
                self._left @ self._left
            self.optimizer.step()
            if saving and step == 0:
                before = time.perf_counter(), time.thread_time()
                self.saves += 1
                self.checkpointer.save(self.saves, self.state)
                save = time.perf_counter() - before[0], time.thread_time() - before[1]
        loop = time.perf_counter() - begin, time.thread_time() - core
        self.checkpointer.wait()
        if saving:
            self.checkpointer.remove(self.saves)
        return Took(*loop, *save, gate.held_seconds - held)

    def processor_of_a_save(self) -> float:
        """CPU-seconds of all threads in a save after a step, while the loop does nothing else."""
        self.optimizer.step()
        self.saves += 1
        begin = time.process_time()
        self.checkpointer.save(self.saves, self.state, wait=True)
        taken = time.process_time() - begin
        self.checkpointer.remove(self.saves)
        return taken


def work_of_a_save(size: int, folder: Path) -> float:
    """CPU-seconds of a memcpy, a digest and a direct write of `size` bytes, one after the other."""
    source, target = torch.ones(size // 4), torch.ones(size // 4)
    address = target.data_ptr()
    memory: Any = (ctypes.c_char * size).from_address(address)
    view, shift = memoryview(memory), -address % 4096
    begin = time.process_time()
    ctypes.memmove(address, source.data_ptr(), size)
    for start in range(0, size, _PIECE):
        xxhash.xxh3_128_hexdigest(view[start : start + _PIECE])
    path = folder / "raw"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
    whole = size - shift - (size - shift) % 4096
    os.posix_fallocate(descriptor, 0, whole)
    for start in range(0, whole, 16 << 20):
        os.pwrite(descriptor, view[shift + start : shift + min(start + (16 << 20), whole)], start)
    os.fsync(descriptor)
    os.close(descriptor)
    taken = time.process_time() - begin
    path.unlink()
    return taken
