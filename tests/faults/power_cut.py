"""A power cut on a real file system: it is shut down under a saving loop, as xfstests does it, and mounted again.

The shutdown throws away what the system holds in memory and has not written, the journal's open transaction included;
mounting then recovers from the journal. ext4 in a file, mounted through a loop device: this needs root.

As a command: ``python tests/faults/power_cut.py --trials 200``.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from killed_saver import check, loop

from milepost.testing.disks import Disk


def trial(disk: Disk, newest: int, number: int, draw: random.Random) -> tuple[int, int]:
    """Save until the power goes. Returns the newest step that is there afterwards, and how many were acknowledged."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(readable)
            loop(disk.mounted / "run", mmap.mmap(-1, 4096), writable, number % 2 == 0, number)
        except BaseException:
            pass  # the disk is gone
        finally:
            os._exit(1)
    os.close(writable)
    data = os.read(readable, 8)
    began = time.monotonic()
    data += os.read(readable, 8) if number % 3 else b""
    time.sleep(draw.random() * 1.5 * max(time.monotonic() - began, 0.02))  # a moment, not a wait for something
    disk.cut()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(readable, "rb") as reports:
        data += reports.read()
    disk.unmount()
    disk.mount()
    steps = [int.from_bytes(data[n : n + 8], "little") for n in range(8, len(data), 8)]
    return check(disk.mounted / "run", max([newest, *steps])), len(steps)


def trials(disk: Disk, count: int, seed: int = 0) -> int:
    """Cut the power `count` times; returns how many saves were acknowledged."""
    draw, newest, saves = random.Random(seed), 0, 0
    for number in range(count):
        newest, many = trial(disk, newest, number, draw)
        saves += many
    return saves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    place, begun = Path(tempfile.mkdtemp(prefix="milepost-")), time.monotonic()
    disk = Disk(place)
    saves = trials(disk, given.trials, given.seed)
    disk.unmount()
    shutil.rmtree(place)
    print(f"{given.trials} power cuts on ext4 in {time.monotonic() - begun:.0f} s, {saves} acknowledged saves:"
          " nothing torn, nothing acknowledged lost, nothing left over.")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
