"""The README's program is what it says: it runs as printed, in 25 lines, and leaves a checkpoint to go on from."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def program() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 1, "the README holds one program"
    return str(blocks[0])


def test_program_fits_in_25_lines() -> None:
    assert len(program().splitlines()) <= 25


def test_program_runs_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(program())
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    for _ in range(2):  # the second run finds the first one's checkpoint
        result = subprocess.run(
            [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
    last = torch.load(tmp_path / "runs/last.ckpt", weights_only=True)
    assert last["global_step"] == 135  # 3 epochs of 45 batches
