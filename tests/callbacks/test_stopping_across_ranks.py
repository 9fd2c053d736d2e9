"""What one rank decides, all do: a rank that stopped alone would leave the others waiting."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from milepost.callbacks import EarlyStopping, Timer

MODULE: Any = None


def trainer(value: float) -> Any:
    return SimpleNamespace(
        state=SimpleNamespace(fn="fit"), sanity_checking=False, fast_dev_run=False, current_epoch=0, should_stop=False,
        callback_metrics={"m": torch.tensor(value)}, is_global_zero=False,
    )  # fmt: skip


def one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    diverged = trainer(float("nan") if rank == 1 else 0.5)
    EarlyStopping("m", check_on_train_epoch_end=False).on_validation_end(diverged, MODULE)
    calm = trainer(0.5)
    EarlyStopping("m", check_on_train_epoch_end=False).on_validation_end(calm, MODULE)
    late = trainer(0.5)
    clock = iter([0.0, 20.0] if rank == 0 else [0.0, 1.0])
    timer = Timer("00:00:00:10", clock=lambda: next(clock))
    timer.on_train_start(late, MODULE)
    timer.on_train_batch_end(late, MODULE, None, None, 0)
    Path(folder, f"rank{rank}").write_text(f"{diverged.should_stop} {calm.should_stop} {late.should_stop}")
    dist.destroy_process_group()


def test_both_ranks_stop(tmp_path: Path) -> None:
    mp.spawn(one_rank, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        assert Path(tmp_path, f"rank{rank}").read_text() == "True False True"
