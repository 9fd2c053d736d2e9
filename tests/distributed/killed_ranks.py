"""torch's elastic launcher starts two ranks again and again, of which one is killed at a random moment each time.

As a command, ``python tests/distributed/killed_ranks.py --kills 50``, it kills as often as it is told and says whether
the run came to the same bits as one that nobody disturbed. Ranks are forked, so that a start costs no imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  # by DDP: once, not in each rank at each start
from runs import digest, fit
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from milepost.callbacks import Callback, ModelCheckpoint
from milepost.plugins import SnapshotCheckpointIO

RANKS = 2
BATCHES_AT_MOST = 3
DELAY_SECONDS = 0.05


class KillOne(Callback):
    """Kills one of the ranks a while after one of its first batches, wherever it is by then."""

    def __init__(self, kills: int, seed: int) -> None:
        self.start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        draw = random.Random(f"{seed} {self.start}")
        self.rank, self.left, self.delay = (
            draw.randrange(RANKS), draw.randrange(1, BATCHES_AT_MOST + 1), draw.random() * DELAY_SECONDS,
        )  # fmt: skip
        self.on = self.start < kills

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.left -= 1
        if self.on and self.left == 0 and trainer.global_rank == self.rank:
            threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


def train(folder: Path, epochs: int, kills: int, seed: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, monitor=None)
    killer = KillOne(kills, seed)
    trainer, net = fit(
        folder, killer, saver, ckpt_path="auto", max_epochs=epochs, plugins=[SnapshotCheckpointIO(threads=1)]
    )
    return {"digest": digest(trainer, net), "starts": killer.start + 1, "resumed": trainer.ckpt_path is not None}


def launched(folder: Path, kills: int, epochs: int, seed: int) -> dict[str, Any]:
    """The run, started again as often as one of its ranks was killed. What rank 0 came to."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=RANKS, run_id=folder.name, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=kills, monitor_interval=0.05, start_method="fork",
    )  # fmt: skip
    results = elastic_launch(config, train)(folder, epochs, kills, seed)
    assert results[0]["digest"] and results[0]["starts"] == results[1]["starts"]
    found: dict[str, Any] = results[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="milepost-"))
    epochs = given.kills * BATCHES_AT_MOST // 4 + 2  # of four batches of a rank: the run outlives its kills
    begun = time.monotonic()
    whole = launched(folder / "whole", 0, epochs, given.seed)
    killed = launched(folder / "killed", given.kills, epochs, given.seed)
    same = whole["digest"] == killed["digest"]
    (folder / "found.json").write_text(json.dumps({"whole": whole, "killed": killed}))
    print(
        f"{killed['starts'] - 1} kills of {given.kills}, {4 * epochs} batches a rank, {time.monotonic() - begun:.0f} s:"
        f" {'the same bits' if same else 'OTHER BITS'}."
    )
    sys.exit(not same)


if __name__ == "__main__":
    main()
