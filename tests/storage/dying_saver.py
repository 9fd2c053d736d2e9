"""Savers that die at a random byte or a random moment, 200 of them: run by test_local.py.

Each is a fork that saves one checkpoint after another over the same path. Most die of the kernel's own limit on the
size of a file, in the middle of the write that crosses it; the others are killed by the parent at some instant of
their second save or a later one.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from milepost.plugins import TorchCheckpointIO

TRIALS = 200


def state(step: int) -> dict[str, object]:
    return {"global_step": step, "state_dict": {"w": torch.full((30_000,), float(step)), "b": torch.full((7,), step)}}


def child(path: Path, first: int, limit: int | None, saved: mmap.mmap) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for step in range(first, first + 10**6):
        TorchCheckpointIO().save_checkpoint(state(step), path)
        saved[0] = 1


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    random.seed(int(sys.argv[2]))
    io, path = TorchCheckpointIO(), folder / "a.ckpt"
    io.save_checkpoint(state(0), path)
    size = path.stat().st_size
    saved = mmap.mmap(-1, 1)
    known, seen = 0, {"died in a write": 0, "killed": 0, "moved on": 0}
    for trial in range(TRIALS):
        by_limit = trial % 5 != 0
        saved[0] = 0
        pid = os.fork()
        if pid == 0:
            child(path, known + 1, random.randrange(size) if by_limit else None, saved)
        if not by_limit:
            while not saved[0]:
                os.sched_yield()
            end = time.perf_counter() + random.random() * 0.01
            while time.perf_counter() < end:
                os.sched_yield()
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), status
        seen["died in a write" if os.WTERMSIG(status) == signal.SIGXFSZ else "killed"] += 1
        loaded = io.load_checkpoint(path)  # verifies every byte
        step = loaded["global_step"]
        assert step >= known and bool((loaded["state_dict"]["w"] == step).all()), (trial, step, known)
        seen["moved on"] += step > known
        known = step
    io.save_checkpoint(state(known + 1), path)
    print(json.dumps({**seen, "left": [p.name for p in folder.iterdir()]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
