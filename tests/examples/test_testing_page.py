"""The page on proving a store: its store passes the suite as printed, and writes no faster than it was told."""

from __future__ import annotations

import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from milepost import Checkpointer
from milepost.storage.store import LocalStore
from milepost.testing import StoreTests

PAGE = Path(__file__).parents[2] / "docs/testing.md"
NAMES: dict[str, Any] = {"StoreTests": StoreTests, "LocalStore": LocalStore, "threading": threading, "time": time}
for code in re.findall(r"```python store(?: tests)?\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
    exec(code, NAMES)


class TestThrottledStore(NAMES["TestThrottledStore"]):  # type: ignore[misc]
    def make_root(self, tmp_path: Path) -> Path:
        """In memory where there is some: on a disk the suite is run by tests/testing."""
        return Path(tempfile.mkdtemp(dir="/dev/shm")) if Path("/dev/shm").is_dir() else tmp_path


def test_the_store_keeps_to_its_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    with Checkpointer(tmp_path, store=NAMES["ThrottledStore"](1000.0), background=False) as c:
        c.save(1, {"x": torch.ones(1000)})
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert max(waited) >= written / 1000.0
