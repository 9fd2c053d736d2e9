"""A checkpoint is converted in less memory than its tensors take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from milepost.engine.directory import DirectoryEngine
from milepost.engine.spill import Spill, free_memory_bytes
from milepost.plugins import TorchCheckpointIO

MIB = 1 << 20


def run(source: Path, target: Path, memory: int) -> subprocess.CompletedProcess[str]:
    program = Path(__file__).with_name("bounded_convert.py")
    arguments = [str(source), str(target), str(memory), str(150 * MIB)]
    return subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True, check=False)


def test_tensors_of_more_than_the_memory_are_converted(tmp_path: Path) -> None:
    weights = {f"w{n}": torch.randn(10, 1 << 20) for n in range(6)}
    weights["t"] = torch.randn(3, 5, 7, 2).to(memory_format=torch.channels_last)
    engine = DirectoryEngine()
    engine.save(tmp_path / "c", {"model": weights, "epoch": 3}, background=False)
    engine.close()
    failed = run(tmp_path / "c", tmp_path / "a.ckpt", memory=1 << 40)
    assert failed.returncode != 0 and not (tmp_path / "a.ckpt").exists()  # the limit is one
    done = run(tmp_path / "c", tmp_path / "b.ckpt", memory=0)
    assert done.returncode == 0, done.stderr
    state = TorchCheckpointIO().load_checkpoint(tmp_path / "b.ckpt")
    assert state["epoch"] == 3 and all(torch.equal(state["model"][name], w) for name, w in weights.items())
    assert state["model"]["t"].stride() == weights["t"].stride()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.ckpt", "c"]


def test_tensors_in_a_spill_are_apart_and_aligned(tmp_path: Path) -> None:
    spill = Spill(tmp_path, 3 * 7 + 8 * 5, 3)
    one, two, none = spill.empty((3, 7), torch.uint8), spill.empty((5,), torch.float64), spill.empty((0, 2), torch.int8)
    one.fill_(1)
    two.fill_(2)
    assert one.eq(1).all() and two.eq(2).all() and none.shape == (0, 2)
    assert two.data_ptr() % 64 == one.data_ptr() % 64 == 0 and not list(tmp_path.iterdir())
    assert free_memory_bytes() > 0
