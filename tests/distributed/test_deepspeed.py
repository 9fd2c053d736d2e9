"""DeepSpeed's own checkpoints go through a CheckpointIO, file by file, whole or not at all. Needs DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from milepost import _optional
from milepost.plugins import SnapshotCheckpointIO, TorchCheckpointIO
from milepost.strategies import SingleDeviceStrategy
from milepost.trainer.state import read_checkpoint

pytestmark = [
    pytest.mark.skipif(not _optional.available("deepspeed"), reason="DeepSpeed is not installed: make test-deepspeed"),
    pytest.mark.timeout(900),  # a launch imports DeepSpeed in each process
]
HERE = Path(__file__).parent


def launch(script: str, *arguments: str, ranks: int = 2) -> str:
    """Run a script of this directory on `ranks` processes; returns what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [*command, str(HERE / script), *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-8000:]
    return run.stdout


def test_a_plain_loop_saves_and_loads_through_checkpoint_ios_at_every_stage(tmp_path: Path) -> None:
    launch("deepspeed_loop.py", str(tmp_path))
    first, second = (json.loads((tmp_path / f"calls{rank}.json").read_text()) for rank in (0, 1))
    model, record = "mp_rank_00_model_states.pt", "record.ckpt"
    shards = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
    saved = [["save", model], ["save", shards[0]], ["save", record]]
    failed = [["save", model], ["save", shards[0]], ["remove", model], ["remove", shards[0]], ["load", model]]
    removed = [["load", record], ["remove", record], ["remove", model], ["remove", shards[0]], ["remove", shards[1]]]
    assert first == [*saved, *failed, *removed]
    assert second == [["save", shards[1]], ["save", shards[1]], ["load", model]]


def test_trainer_runs_go_on_bit_for_bit_under_deepspeed_and_under_ddp(tmp_path: Path) -> None:
    launch("deepspeed_fit.py", "stages", str(tmp_path))
    with pytest.raises(AssertionError, match="SIGKILL"):
        launch("deepspeed_fit.py", "killed", str(tmp_path))
    left = sorted(p.name for p in (tmp_path / "run").glob("*.ckpt"))
    assert "step=3.ckpt" in left and "step=6.ckpt" in left
    complete = [p for p in (tmp_path / "run").glob("*.ckpt") if (p / "record.ckpt").exists()]
    assert {p.name for p in complete} == {"step=3.ckpt", "step=6.ckpt", "last.ckpt"}
    launch("deepspeed_fit.py", "resumed", str(tmp_path))
    for rank in (0, 1):
        losses, weights = torch.load(tmp_path / "unbroken" / f"unbroken{rank}.pt")
        resumed_losses, resumed = torch.load(tmp_path / f"resumed{rank}.pt")
        assert resumed_losses == losses[6:]
        assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    single_device_reads(tmp_path)
    launch("deepspeed_fit.py", "single", str(tmp_path), ranks=1)


def single_device_reads(root: Path) -> None:
    """What DeepSpeed has saved on two ranks, here without DeepSpeed, on one."""
    for stage, plugin in ((0, TorchCheckpointIO()), (3, SnapshotCheckpointIO())):
        path = str(root / f"stage{stage}" / "step=9.ckpt")
        loaded = SingleDeviceStrategy(checkpoint_io=plugin).load_checkpoint(path)
        state = loaded["optimizer_states"][0]
        assert [len(group["params"]) for group in state["param_groups"]] == [2, 5]
        assert {n: tuple(s["exp_avg"].shape) for n, s in state["state"].items()}[0] == (16, 7)
        assert all(s["step"] == 9 for s in state["state"].values()) and 1 not in state["state"]
        assert loaded["global_step"] == 9 and loaded["state_dict"]["first.weight"].shape == (16, 7)
        plugin.teardown()
    whole = {stage: read_checkpoint(root / f"stage{stage}" / "step=9.ckpt") for stage in (0, 3)}
    for name, weight in whole[0]["state_dict"].items():
        assert torch.equal(weight, whole[3]["state_dict"][name]), name
