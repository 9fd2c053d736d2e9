"""`python -m milepost.utilities.upgrade_checkpoint` on files that old Lightning versions wrote."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from milepost.trainer.migration import CONTRACT_VERSION, migrate_checkpoint
from milepost.utilities.upgrade_checkpoint import main

OLD = Path(__file__).parent / "old_lightning"


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_a_directory_of_old_files_is_upgraded_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = ["1.6.5-epoch.ckpt", "1.9.5-middle.ckpt", "2.2.5-manual.ckpt"]
    (tmp_path / "deeper").mkdir()
    for name in old:
        shutil.copy(OLD / name, tmp_path / "deeper" / name)
    assert main([str(tmp_path), "--map-to-cpu"]) == 0
    assert capsys.readouterr().out.count("upgraded from") == 3
    for name in old:
        upgraded, expected = read(tmp_path / "deeper" / name), migrate_checkpoint(read(OLD / name))
        assert upgraded["pytorch-lightning_version"] == CONTRACT_VERSION
        assert upgraded["legacy_pytorch-lightning_version"] == name.partition("-")[0]
        assert upgraded.keys() == expected.keys() and str(upgraded["loops"]) == str(expected["loops"])
        assert all(torch.equal(upgraded["state_dict"][k], v) for k, v in expected["state_dict"].items())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ckpt")}
    assert main([str(path) for path in before]) == 0
    assert capsys.readouterr().out.count(f"left as it is: its version is {CONTRACT_VERSION}") == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_cannot_be_upgraded_is_told_and_left_alone(tmp_path: Path) -> None:
    torn, good = tmp_path / "torn.ckpt", tmp_path / "good.ckpt"
    torn.write_bytes((OLD / "1.9.5-epoch.ckpt").read_bytes()[:900])
    shutil.copy(OLD / "1.9.5-epoch.ckpt", good)
    program = [sys.executable, "-m", "milepost.utilities.upgrade_checkpoint", tmp_path / "absent.ckpt", torn, good]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "absent.ckpt: Checkpoint file not found" in done.stderr and "torn.ckpt" in done.stderr
    assert len(torn.read_bytes()) == 900
    assert read(good)["pytorch-lightning_version"] == CONTRACT_VERSION
