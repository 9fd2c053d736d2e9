"""Ours pass the conformance suite, and it catches every planted defect."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from milepost.plugins import AsyncCheckpointIO, SafetensorsCheckpointIO, SnapshotCheckpointIO, TorchCheckpointIO
from milepost.testing import CheckpointIOTests


class TestTorch(CheckpointIOTests):
    def make_io(self) -> Any:
        return TorchCheckpointIO()


class TestAsync(CheckpointIOTests):
    def make_io(self) -> Any:
        return AsyncCheckpointIO()


class TestAsyncWithRoom(CheckpointIOTests):
    def make_io(self) -> Any:
        return AsyncCheckpointIO(max_pending=3)


class TestPickling(CheckpointIOTests):
    """What `check` passes under ``allow_pickle`` is loaded by the caller's choice only, so it is made here."""

    def make_io(self) -> Any:
        class Trusting(TorchCheckpointIO):
            def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> Any:
                return super().load_checkpoint(path, map_location, weights_only=False)

        return Trusting(allow_pickle=True)


class TestSnapshot(CheckpointIOTests):
    def make_io(self) -> Any:
        return SnapshotCheckpointIO()


class TestSafetensors(CheckpointIOTests):
    def make_io(self) -> Any:
        return SafetensorsCheckpointIO()


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


class Late:
    """The handle of a save that is made when the result is asked for."""

    path = ""

    def __init__(self, work: Any) -> None:
        self.work = work

    def done(self) -> bool:
        return self.work is None

    def result(self, timeout: Any = None) -> None:
        work, self.work = self.work, None
        if work is not None:
            work()


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
    "exists remembers what was removed": """
        def remove_checkpoint(self, path):
            super().remove_checkpoint(path); self.gone = path
        def exists(self, path): return path in self._kept or path == getattr(self, 'gone', None)""",
    "clears the place before it writes": """
        def save_checkpoint(self, c, path, storage_options=None):
            self._kept.pop(path, None); super().save_checkpoint(c, path)""",
    "writes only when the result is asked for": """
        def save_checkpoint(self, c, path, storage_options=None):
            return Late(lambda: InMemory.save_checkpoint(self, c, path))""",
    "writes only when the result is asked for, wait forgets": """
        def save_checkpoint(self, c, path, storage_options=None):
            c = copy.deepcopy(c)
            return Late(lambda: InMemory.save_checkpoint(self, c, path))
        def wait(self): pass""",
    "tells of a failure again at teardown": """
        def save_checkpoint(self, c, path, storage_options=None):
            try: super().save_checkpoint(c, path)
            except OSError as e: self.failed = e; raise
        def teardown(self):
            if getattr(self, 'failed', None): raise self.failed""",
    "is never done": """
        def save_checkpoint(self, c, path, storage_options=None):
            super().save_checkpoint(c, path); late = Late(lambda: None); late.done = lambda: False
            return late""",
    "check refuses everything": "def check(self, c): raise TypeError('no')",
    "check edits": "def check(self, c): c['checked'] = True",
    "check draws random numbers": "def check(self, c): torch.rand(1)",
    "check passes what does not come back": """
        def check(self, c): pass
        def load_checkpoint(self, path):
            d = super().load_checkpoint(path); d.pop('foreign', None); return d""",
}

FILE_DEFECTS = {
    "verify passes everything": "def verify(self, path): return None",
    "verify looks at the size": """
        def verify(self, path):
            if Path(path).stat().st_size != self.size: raise OSError
        def save_checkpoint(self, c, path, storage_options=None):
            super().save_checkpoint(c, path); self.size = Path(path).stat().st_size""",
    "verify reads to the end of the tensors": """
        def verify(self, path):
            content = Path(path).read_bytes()
            if zlib.crc32(content[:40_000]) != self.crc: raise OSError
        def save_checkpoint(self, c, path, storage_options=None):
            super().save_checkpoint(c, path); self.crc = zlib.crc32(Path(path).read_bytes()[:40_000])""",
    "probe leaves what it wrote": """
        def probe(self, directory):
            Path(directory).mkdir(parents=True); return 1""",
    "verify opens it with torch": "def verify(self, path): torch.load(path, weights_only=True)",
    "check passes everything": "def check(self, c): pass",
    "lists what is not there": """
        def list(self, directory):
            return [*super().list(directory), *(['ghost'] if Path(directory).is_dir() else [])]""",
    "lists what was removed": """
        def list(self, directory):
            self.all = sorted({*getattr(self, 'all', ()), *super().list(directory)}); return self.all
        """,
}


ALL = {name: ("InMemory", code) for name, code in DEFECTS.items()}
ALL |= {name: ("TorchCheckpointIO", code) for name, code in FILE_DEFECTS.items()}

# Which test of the suite must fail for a defect, where more than one could be expected to.
MEANT_FOR = {
    "clears the place before it writes": "test_a_save_that_fails_midway_leaves_what_was_there",
    "writes only when the result is asked for": "test_after_teardown_everything_is_there",
    "writes only when the result is asked for, wait forgets": "test_after_wait_everything_is_there",
    "tells of a failure again at teardown": "test_a_failed_save_is_told_of_once",
    "is never done": "test_a_handle_that_gave_its_result_is_done",
    "check refuses everything": "test_check_passes_what_a_trainer_saves_and_changes_nothing",
    "check edits": "test_check_passes_what_a_trainer_saves_and_changes_nothing",
    "check draws random numbers": "test_check_passes_what_a_trainer_saves_and_changes_nothing",
    "check passes what does not come back": "test_what_check_passes_comes_back",
    "check passes everything": "test_what_check_passes_comes_back",
    "verify passes everything": "test_verify_finds_damage[bit 0]",
    "verify looks at the size": "test_verify_finds_damage[bit 1]",
    "verify opens it with torch": "test_verify_finds_damage[bit 0.5]",
    "verify reads to the end of the tensors": "test_verify_finds_damage[cut 0.999]",
    "probe leaves what it wrote": "test_probe_leaves_nothing",
    "lists what is not there": "test_list",
    "lists what was removed": "test_list",
    "exists remembers what was removed": "test_exists",
}


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The tests of the suite that fail for each defect, from one pytest run in a process of its own."""
    folder = tmp_path_factory.mktemp("defects")
    parts = [
        "import copy, torch, zlib",
        "from pathlib import Path",
        "from milepost.plugins import TorchCheckpointIO",
        "from milepost.testing import CheckpointIOTests",
        "from suite import InMemory, Late",
    ]
    for number, (parent, code) in enumerate(ALL.values()):
        body = textwrap.indent(textwrap.dedent(code).strip(), "    ")
        parts.append(f"class D{number}({parent}):\n    _kept = {{}}\n{body}\n")
        parts.append(f"class TestD{number}(CheckpointIOTests):\n    def make_io(self): return D{number}()\n")
    (folder / "test_defects.py").write_text("\n".join(parts))
    source = Path(__file__).read_text()
    start, end = source.index("class InMemory"), source.index("class TestInMemory")
    (folder / "suite.py").write_text("import copy\nfrom typing import Any\n\n" + source[start:end])
    pytest_run = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "--tb=no", "-c", "/dev/null"]
    run = subprocess.run(
        [*pytest_run, str(folder)],
        env={"PYTHONPATH": ":".join([str(folder), *sys.path]), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "error" not in run.stdout.splitlines()[-1], run.stdout
    found: dict[str, set[str]] = {name: set() for name in ALL}
    for number, test in re.findall(r"^FAILED \S+::TestD(\d+)::(\w+(?:\[[^\]]*\])?)", run.stdout, re.MULTILINE):
        found[list(ALL)[int(number)]].add(test)
    return found


@pytest.mark.parametrize("name", ALL)
def test_defect_is_caught(failed: dict[str, set[str]], name: str) -> None:
    assert failed[name], f"no test of the suite failed for the defect: {name}"
    assert MEANT_FOR.get(name, next(iter(failed[name]))) in failed[name], failed[name]


def test_every_test_of_the_suite_finds_some_defect(failed: dict[str, set[str]]) -> None:
    useful = {test.partition("[")[0] for tests in failed.values() for test in tests}
    assert {name for name in vars(CheckpointIOTests) if name.startswith("test_")} - useful == {"test_it_is_recognised"}
