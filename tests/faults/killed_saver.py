"""A loop that saves, replaces and removes until it is killed: a forked child, trial after trial, on one directory.

As a command, ``python tests/faults/killed_saver.py --trials 1000``, it kills that often and prints what was hit.
"""

from __future__ import annotations

import argparse
import collections
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from milepost import Checkpointer
from milepost.engine.retention import KeepNewest
from milepost.storage.store import LocalStore

PHASES = ("training", "staging", "writing", "commit", "removal")
KEPT = 2


class Telling:
    """Notes in memory shared with the parent which phase the saver is in, call by call."""

    def __init__(self, shared: mmap.mmap) -> None:
        self._store = LocalStore()
        self._shared = shared

    def __getattr__(self, name: str) -> Any:
        made = getattr(self._store, name)

        def call(*given: Any) -> Any:
            self._shared[0] = self._phase(name, given)
            return made(*given)

        return call

    def _phase(self, name: str, given: tuple[Any, ...]) -> int:
        removed = name.startswith("remove") or (name == "rename" and "/.removed-" in given[1])
        commit = name in ("rename", "exchange", "sync_directory")
        if name == "sync_directory" and self._shared[0] == PHASES.index("removal"):
            commit, removed = False, True
        return PHASES.index("removal" if removed else "commit" if commit else "writing")


def state(step: int) -> dict[str, Any]:
    return {
        "model": {"frozen": torch.arange(200_000.0), "trained": torch.full((30_000,), float(step))},
        "optimizer": [torch.full((50_000,), float(step)), {"step": step}],
    }


def loop(directory: Path, shared: mmap.mmap, acknowledged: int, background: bool, seed: int) -> None:
    """Save step after step, sometimes the same again, and report each one that is durable as 8 bytes."""
    draw = random.Random(seed)
    with Checkpointer(
        directory, background=background, threads=1, keep=KeepNewest(KEPT), store=Telling(shared)
    ) as checkpointer:
        live = state(0)
        step = checkpointer.restore(live)
        os.write(acknowledged, b"begun...")
        while True:
            step += draw.random() < 0.7  # else it is replaced
            step = max(step, 1)
            shared[0] = PHASES.index("training")
            live = state(step)
            shared[0] = PHASES.index("staging")
            checkpointer.save(step, live).result()
            os.write(acknowledged, step.to_bytes(8, "little"))


def killed(directory: Path, delay: Callable[[float], float], background: bool, seed: int) -> tuple[str, int, int]:
    """Run the loop and kill it. Returns the phase it was in, the newest step it reported (0: none), and how many.

    Args:
        delay: from the seconds that the first save took, how long after it to kill. Every third is killed before it.
    """
    shared = mmap.mmap(-1, 4096)
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(readable)
            loop(directory, shared, writable, background, seed)
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(1)
    os.close(writable)
    data = os.read(readable, 8)
    began = time.monotonic()
    if seed % 3:
        data += os.read(readable, 8)
    time.sleep(delay(time.monotonic() - began))  # a moment, not a wait for something
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert data.startswith(b"begun...") and status == -signal.SIGKILL, f"the saver ended by itself: {status}"
    with os.fdopen(readable, "rb") as reports:
        data += reports.read()
    steps = [int.from_bytes(data[n : n + 8], "little") for n in range(8, len(data), 8)]
    return PHASES[shared[0]], max(steps, default=0), len(steps)


def check(directory: Path, at_least: int) -> int:
    """What is there is whole, nothing acknowledged is lost, nothing is left over. Returns the newest step."""
    with warnings.catch_warnings(), Checkpointer(directory, background=False, threads=1) as checkpointer:
        warnings.simplefilter("error")
        live = state(0)
        step = checkpointer.restore(live)
        assert step >= at_least, f"step {at_least} was acknowledged, {step} is there"
        if step:
            assert torch.equal(live["model"]["trained"], state(step)["model"]["trained"])
            assert torch.equal(live["model"]["frozen"], state(step)["model"]["frozen"])
            assert live["optimizer"][1] == {"step": step} and bool((live["optimizer"][0] == step).all())
        for other in checkpointer.steps():
            checkpointer.verify(other)
        names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
        assert all(name.startswith("step-") for name in names), names
    return step


def trials(directory: Path, count: int, seed: int = 0) -> tuple[collections.Counter[str], int]:
    """Kill `count` times; returns how often each phase was hit, and how many saves were acknowledged."""
    draw = random.Random(seed)
    phases: collections.Counter[str] = collections.Counter()
    newest = saves = 0
    usual = 0.02

    def delay(took: float) -> float:
        nonlocal usual
        usual = took if took > 0.001 else usual
        return draw.random() * 1.5 * usual

    for number in range(count):
        phase, reported, many = killed(directory, delay, number % 2 == 0, number)
        phases[phase] += 1
        saves += many
        newest = check(directory, max(newest, reported))
    with Checkpointer(directory, keep=KeepNewest(KEPT)) as checkpointer:
        checkpointer.save(newest + 1, state(newest + 1))
    assert len(checkpointer.steps()) == KEPT == len(list(directory.iterdir())), "a save that is not killed keeps order"
    return phases, saves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="on the disk to try; a temporary one if not given")
    given = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="milepost-", dir=given.directory))
    begun = time.monotonic()
    phases, saves = trials(directory / "run", given.trials, given.seed)
    shutil.rmtree(directory)
    hit = ", ".join(f"{name} {phases[name]}" for name in PHASES)
    print(f"{given.trials} kills in {time.monotonic() - begun:.0f} s after {saves} acknowledged saves: {hit}.")
    print("Nothing torn, nothing acknowledged lost, nothing left over.")


if __name__ == "__main__":
    sys.exit(main())
