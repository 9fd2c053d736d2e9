"""A run that is started again in a new process, under a logger that numbers its directories anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from versioned_run import fit

PROGRAM = Path(__file__).with_name("versioned_run.py")


def _start(root: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(PROGRAM), str(root), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_new_process_goes_on_from_the_version_before(tmp_path: Path) -> None:
    first = _start(tmp_path, "auto", "1")
    assert "began at 0" in first and "warned" not in first and "version_0" in first
    second = _start(tmp_path, "last", "2")
    assert "began at 4" in second and "version_1" in second
    assert "version_0/checkpoints/epoch=0-step=4.ckpt, the newest of the earlier versions" in second
    kept = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.ckpt")}
    assert kept == {
        "lightning_logs/version_0/checkpoints/epoch=0-step=4.ckpt",
        "lightning_logs/version_1/checkpoints/epoch=1-step=8.ckpt",
    }, "what lies in the earlier version is not deleted"


def test_auto_goes_on_from_the_newest_good_of_all_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(str(tmp_path), "auto", 1)
    with pytest.warns(UserWarning, match=r"'auto'.*version_0"):
        fit(str(tmp_path), "auto", 2)
    torn = tmp_path / "lightning_logs/version_1/checkpoints/epoch=1-step=8.ckpt"
    os.truncate(torn, 900)
    with pytest.warns(UserWarning, match=r"damaged .*version_1"), pytest.warns(UserWarning, match=r"from .*version_0"):
        fit(str(tmp_path), "auto", 2)
    began = [line for line in capsys.readouterr().out.splitlines() if line.startswith("began")]
    assert began == ["began at 0", "began at 4", "began at 4"]


def test_a_version_with_a_name_means_that_place_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(str(tmp_path), "auto", 1)
    fit(str(tmp_path), "auto", 1, "other")
    assert capsys.readouterr().out.count("began at 0") == 2
