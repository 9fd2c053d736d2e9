"""Ours pass the conformance suite of stores, and it catches every planted defect."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from store_defects import DECORATORS, FILES, NAMES, WHOLE

from milepost.storage.store import LocalStore, Store
from milepost.testing import StoreTests
from milepost.testing.store_calls import StoreCallTests

ALL = {**FILES, **NAMES, **WHOLE, **DECORATORS}
ON_A_DISK = "write takes aligned memory alone"  # direct I/O in memory takes any
NEEDS_ROOT = {"what_is_durable_outlives_a_power_cut", "that_there_is_no_space_is_known_at_once"}


class TestLocal(StoreTests):
    def make_store(self) -> Store:
        return LocalStore()


class TestLocalInMemory(StoreTests):
    def make_store(self) -> Store:
        return LocalStore()

    def make_root(self, tmp_path: Path) -> Path:
        if not Path("/dev/shm").is_dir():
            pytest.skip("there is no file system in memory")
        return Path(tempfile.mkdtemp(prefix="milepost-", dir="/dev/shm"))


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The tests that fail for each defect, of those that are meant for it: one pytest run in a process of its own."""
    folder = tmp_path_factory.mktemp("defects")
    parts = [
        "import errno, os, shutil, tempfile, time",
        "from pathlib import Path",
        "from milepost.storage.store import LocalStore",
        "from milepost.testing import StoreTests",
        "class Passing:",
        "    def __init__(self, store=None): self._store = store or LocalStore()",
        "    def __getattr__(self, name): return getattr(self._store, name)",
    ]
    for number, (name, (_, code)) in enumerate(ALL.items()):
        body = textwrap.indent(textwrap.dedent(code).strip(), "    ")
        parts.append(f"class D{number}({'Passing' if name in DECORATORS else 'LocalStore'}):\n{body}\n")
        parts.append(f"class TestD{number}(StoreTests):\n    def make_store(self): return D{number}()")
        if name == ON_A_DISK:
            parts.append(f"    def make_root(self, tmp_path): return Path(tempfile.mkdtemp(dir={str(folder)!r}))")
        if name in DECORATORS:
            parts.append(f"    def make_store_over(self, inner): return D{number}(inner)")
    (folder / "test_defects.py").write_text("\n".join(parts))
    wanted = [
        f"test_defects.py::TestD{n}::test_{test}" for n, (tests, _) in enumerate(ALL.values()) for test in meant(tests)
    ]
    (folder / "wanted").write_text("\n".join(wanted))
    pytest_run = [sys.executable, "-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", "--tb=no", "-c", "/dev/null"]
    memory = ["--basetemp", tempfile.mkdtemp(dir="/dev/shm")] if Path("/dev/shm").is_dir() else []
    run = subprocess.run(
        [*pytest_run, "--rootdir", str(folder), *memory, "@wanted"],
        cwd=folder,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    for made in memory[1:]:
        shutil.rmtree(made)
    found: dict[str, set[str]] = {name: set() for name in ALL}
    for number, test in re.findall(
        r"^(?:FAILED|ERROR) \S+::TestD(\d+)::test_(\w+(?:\[[^\]]*\])?)", run.stdout, re.MULTILINE
    ):
        found[list(ALL)[int(number)]].add(test)
    assert any(found.values()), run.stdout + run.stderr
    return found


def meant(tests: str) -> list[str]:
    return re.findall(r"\w+(?:\[[^\]]*\])?", tests)


@pytest.mark.parametrize("name", ALL)
def test_defect_is_caught(failed: dict[str, set[str]], name: str) -> None:
    missing = set(meant(ALL[name][0])) - failed[name]
    assert not missing - NEEDS_ROOT, f"the suite does not find: {name}"
    if missing:
        assert os.geteuid() != 0 or not shutil.which("mkfs.ext4")


def test_every_test_of_the_suite_finds_some_defect() -> None:
    useful = {"test_" + test.partition("[")[0] for tests, _ in ALL.values() for test in meant(tests)}
    named = {name for kind in (StoreTests, StoreCallTests) for name in vars(kind) if name.startswith("test_")}
    assert named == useful
