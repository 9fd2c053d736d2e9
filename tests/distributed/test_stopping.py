"""A signal to one of several ranks stops all of them at one step, and the run goes on from there bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from runs import digest, fit

from milepost.callbacks import Callback, ModelCheckpoint
from milepost.errors import SIGTERMException
from milepost.plugins import SnapshotCheckpointIO
from milepost.testing import run_ranks


class Send(Callback):
    """Sends some ranks a signal in a batch."""

    def __init__(self, ranks: tuple[int, ...], batch: int) -> None:
        self.ranks, self.batch = ranks, batch

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank in self.ranks and trainer.fit_loop.progress.batch.total.ready == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)


class Where(Callback):
    """How far the run has come."""

    batch = 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.batch = trainer.fit_loop.progress.batch.total.ready


def stopped(folder: Path) -> dict[str, Any]:
    """For each of some ranks that are sent a signal in some batch: where each rank stopped, and how it ended."""
    whole = digest(*fit(folder / "whole"))
    found: dict[str, Any] = {"whole": whole}
    for ranks, batch in (((1,), 3), ((0,), 4), ((0, 1), 5)):
        name = f"{ranks} {batch}"
        for kind in ("file", "directory"):
            place, where = folder / f"{name} {kind}", Where()
            plugins = [SnapshotCheckpointIO(threads=1)] if kind == "directory" else []
            with pytest.raises(SIGTERMException) as caught:
                saver = ModelCheckpoint(dirpath=place, every_n_epochs=0)
                fit(place, Send(ranks, batch), where, saver, plugins=plugins)
            saver = ModelCheckpoint(dirpath=place, every_n_epochs=0)
            again = digest(*fit(place, saver, ckpt_path="auto", seed=8, plugins=plugins))
            found[f"{name} {kind}"] = (where.batch, caught.value.code, again == whole)
    return found


def test_all_ranks_stop_at_one_step_and_go_on_from_it(tmp_path: Path) -> None:
    """Two batches make a step: after the third the step is at the fourth, after the fourth at the sixth."""
    ranks = run_ranks(stopped, 2, tmp_path)
    for found in ranks:
        assert found.pop("whole")
        for name, (batch, code, same) in found.items():
            expected = {"(1,) 3": 4, "(0,) 4": 6, "(0, 1) 5": 6}[name.rsplit(" ", 1)[0]]
            assert (batch, code, same) == (expected, 128 + signal.SIGTERM, True), name
    assert len(ranks[0]) == 6
    for folder in tmp_path.iterdir():
        if folder.name != "whole":
            assert [path.name for path in folder.glob("hpc*")] == ["hpc_ckpt_local_1.ckpt"]
