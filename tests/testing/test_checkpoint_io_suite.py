"""Ours pass the conformance suite, and it catches every planted defect."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from milepost.plugins import AsyncCheckpointIO, SnapshotCheckpointIO, TorchCheckpointIO
from milepost.testing import CheckpointIOTests


class TestTorch(CheckpointIOTests):
    def make_io(self) -> Any:
        return TorchCheckpointIO()


class TestAsync(CheckpointIOTests):
    def make_io(self) -> Any:
        return AsyncCheckpointIO()


class TestSnapshot(CheckpointIOTests):
    def make_io(self) -> Any:
        return SnapshotCheckpointIO()


class TestSnapshotAtOnce(CheckpointIOTests):
    def make_io(self) -> Any:
        return SnapshotCheckpointIO(background=False)


class InMemory:
    """The least that is a plugin: three methods, no base class."""

    _kept: dict[str, Any] = {}  # noqa: RUF012  # shared on purpose: another instance must read it

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        if "blocked" in path:
            raise OSError(f"cannot save to {path}")
        self._kept[path] = copy.deepcopy(checkpoint)

    def load_checkpoint(self, path: str, storage_options: Any = None) -> Any:
        return copy.deepcopy(self._kept[path])

    def remove_checkpoint(self, path: str) -> None:
        self._kept.pop(path, None)


class TestInMemory(CheckpointIOTests):
    def make_io(self) -> Any:
        return InMemory()


DEFECTS = {
    "keeps a reference": "def save_checkpoint(self, c, path, storage_options=None): self._kept[path] = c",
    "drops a key": "def load_checkpoint(self, path): d = super().load_checkpoint(path); d.pop('milepost'); return d",
    "casts to float32": """
        def load_checkpoint(self, path):
            d = super().load_checkpoint(path)
            d['state_dict'] = {k: v.float() for k, v in d['state_dict'].items()}
            return d""",
    "unties": """
        def load_checkpoint(self, path):
            d = super().load_checkpoint(path)
            d['state_dict'] = {k: v.clone() for k, v in d['state_dict'].items()}
            return d""",
    "tuples become lists": """
        def load_checkpoint(self, path):
            d = super().load_checkpoint(path)
            g = d['optimizer_states'][0]['param_groups'][0]
            g['betas'] = list(g['betas'])
            return d""",
    "never replaces": """
        def save_checkpoint(self, c, path, storage_options=None):
            if path not in self._kept: super().save_checkpoint(c, path)""",
    "edits what it is given": """
        def save_checkpoint(self, c, path, storage_options=None):
            super().save_checkpoint(c, path); c['seen'] = True""",
    "swallows errors": """
        def save_checkpoint(self, c, path, storage_options=None):
            try: super().save_checkpoint(c, path)
            except OSError: pass""",
    "removes everything": "def remove_checkpoint(self, path): self._kept.clear()",
    "removes nothing": "def remove_checkpoint(self, path): pass",
    "remove fails where there is none": "def remove_checkpoint(self, path): del self._kept[path]",
    "missing loads as None": "def load_checkpoint(self, path): return self._kept.get(path) or {}",
    "hands out its own copy": "def load_checkpoint(self, path): return self._kept[path]",
    "draws random numbers": """
        def save_checkpoint(self, c, path, storage_options=None):
            torch.rand(1); super().save_checkpoint(c, path)""",
    "private to the instance": "def __init__(self): self._kept = {}",
    "dies at teardown": "def teardown(self): self.save_checkpoint = None",
    "exists is always true": "def exists(self, path): return True",
    "links nothing": "def link(self, source, target): return True",
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Outcome of the suite for every defect, from one pytest run in a process of its own."""
    folder = tmp_path_factory.mktemp("defects")
    parts = ["import copy, torch", "from milepost.testing import CheckpointIOTests", "from suite import InMemory"]
    for number, code in enumerate(DEFECTS.values()):
        body = textwrap.indent(textwrap.dedent(code).strip(), "    ")
        parts.append(f"class D{number}(InMemory):\n    _kept = {{}}\n{body}\n")
        parts.append(f"class TestD{number}(CheckpointIOTests):\n    def make_io(self): return D{number}()\n")
    (folder / "test_defects.py").write_text("\n".join(parts))
    source = Path(__file__).read_text()
    start, end = source.index("class InMemory"), source.index("class TestInMemory")
    (folder / "suite.py").write_text("import copy\nfrom typing import Any\n\n" + source[start:end])
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rfE",
            "-p",
            "no:cacheprovider",
            "--tb=no",
            "-c",
            "/dev/null",
            str(folder),
        ],
        env={"PYTHONPATH": ":".join([str(folder), *sys.path]), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "error" not in run.stdout.splitlines()[-1], run.stdout
    return dict.fromkeys(DEFECTS, run.stdout)


@pytest.mark.parametrize("number", range(len(DEFECTS)), ids=list(DEFECTS))
def test_defect_is_caught(verdicts: dict[str, str], number: int) -> None:
    name = list(DEFECTS)[number]
    assert f"::TestD{number}::" in verdicts[name], f"no test of the suite failed for the defect: {name}"
