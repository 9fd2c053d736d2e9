"""The digits demo runs as a user runs it: a real SIGKILL, a resume, and a picture, with equal weights at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_demo_kills_resumes_and_ends_with_equal_weights(tmp_path: Path) -> None:
    out = tmp_path / "demo-out"
    demo = [sys.executable, str(ROOT / "examples/digits/demo.py"), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(demo, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    killed = [json.loads(line) for line in (out / "killed/log.jsonl").read_text().splitlines()]
    unbroken = [json.loads(line) for line in (out / "unbroken/log.jsonl").read_text().splitlines()]
    again = len(killed) - len(unbroken)
    assert again >= 6, "the batches of at least 3 optimizer steps, of 2 batches each, are run twice"
    assert killed[-1] == unbroken[-1]
    assert all(line in unbroken for line in killed)
    assert (out / "killed/digest.txt").read_text() == (out / "unbroken/digest.txt").read_text()
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    kept = sorted(path.name for path in (out / "killed/checkpoints").glob("*.ckpt"))
    assert "last.ckpt" in kept
    assert len(kept) == 3, kept
