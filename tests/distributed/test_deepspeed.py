"""DeepSpeed's own checkpoints go through a CheckpointIO, file by file, whole or not at all. Needs DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from milepost import _optional

pytestmark = pytest.mark.skipif(not _optional.available("deepspeed"), reason="DeepSpeed is not installed")
HERE = Path(__file__).parent


def launch(script: str, *arguments: str, ranks: int = 2) -> str:
    """Run a script of this directory on `ranks` processes; returns what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [*command, str(HERE / script), *arguments], env=environment, capture_output=True, text=True, timeout=300
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
