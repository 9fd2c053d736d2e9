"""XLACheckpointIO, against a stand-in for torch_xla: the real one wants a TPU or a build of its own.

The stand-in has what xm.save is documented to do: it moves tensors to the host, and writes to a path or a file object,
on the first process of a host unless ``master_only=False``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

STAND_IN = """
import json, os, torch

def is_master_ordinal(local=True):
    return os.environ.get("ORDINAL", "0") == "0"

def save(data, file_or_path, master_only=True, global_master=False):
    with open(os.environ["CALLS"], "a") as log:
        log.write(json.dumps({"path": isinstance(file_or_path, (str, os.PathLike)), "keys": sorted(data)}) + chr(10))
    if os.environ.get("FAILS"):
        file_or_path.write(b"half a file")
        raise RuntimeError("the device is gone")
    if master_only and not is_master_ordinal(local=not global_master):
        return
    torch.save({**data, "moved": "to the host"}, file_or_path)
"""

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from milepost.errors import CheckpointSaveError
from milepost.plugins import XLACheckpointIO
io, path = XLACheckpointIO(), Path(sys.argv[1])
said = {}
try:
    io.save_checkpoint({"global_step": 4, "w": torch.arange(3), "p": Path("x")}, path)
except CheckpointSaveError as error:
    said["error"] = str(error)
if path.exists():
    said["verified"] = io.verify(path) is None
    loaded = io.load_checkpoint(path)
    said["loaded"] = [loaded["w"].tolist(), str(loaded["p"]), loaded.get("moved")]
    said["seal"] = path.read_bytes()[-42:].startswith(b"milepost1:")
try:
    io.save_checkpoint({}, path, storage_options={})
except TypeError as error:
    said["options"] = str(error)
said["left"] = sorted(p.name for p in path.parent.iterdir())
print(json.dumps(said))
"""


def run(tmp_path: Path, **environment: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    package = tmp_path / "site" / "torch_xla" / "core"
    package.mkdir(parents=True)
    for place in (package.parent, package):
        (place / "__init__.py").write_text("")
    (package / "xla_model.py").write_text(STAND_IN)
    calls = tmp_path / "calls"
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path / "run" / "a.ckpt")],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *sys.path]),
            "CALLS": str(calls),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout), [json.loads(line) for line in calls.read_text().splitlines()]


@pytest.mark.parametrize("ordinal", ["0", "1"])
def test_xlas_own_save_serialises_into_the_same_whole_and_sealed_file(tmp_path: Path, ordinal: str) -> None:
    said, calls = run(tmp_path, ORDINAL=ordinal)
    assert calls == [{"path": False, "keys": ["global_step", "milepost", "p", "w"]}]
    assert said["loaded"] == [[0, 1, 2], "x", "to the host"] and said["verified"] and said["seal"]
    assert said["left"] == ["a.ckpt"]
    assert "storage_options={} is not supported for `XLACheckpointIO`" in said["options"]


def test_a_failure_of_xlas_save_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    said, calls = run(tmp_path, FAILS="1")
    assert len(calls) == 1 and said["left"] == []
    assert "step 4" in said["error"] and "RuntimeError: the device is gone" in said["error"]


def test_without_torch_xla_the_extra_is_named() -> None:
    if importlib.util.find_spec("torch_xla") is not None:
        pytest.skip("torch_xla is installed")
    from milepost.plugins import XLACheckpointIO

    with pytest.raises(ModuleNotFoundError, match=r"XLACheckpointIO needs.*milepost\[xla\]"):
        XLACheckpointIO()
