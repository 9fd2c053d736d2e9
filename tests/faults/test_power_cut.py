"""The power goes under a saving loop on a real ext4: ``python tests/faults/power_cut.py`` does it two hundred times."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from power_cut import trials

from milepost.testing.disks import Disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        made = Disk(tmp_path)
    except OSError as error:
        pytest.skip(f"a file system of its own needs the right to mount, and ext4: {error}")
    yield made
    made.unmount()


def test_nothing_that_was_acknowledged_is_lost(disk: Disk) -> None:
    assert trials(disk, 9) >= 6


def test_what_was_not_made_durable_is_lost_or_the_test_above_shows_nothing(disk: Disk) -> None:
    path = disk.mounted / "file"
    path.write_bytes(b"x" * 100_000)
    disk.cut_and_mounted_again()
    assert not path.exists() or path.read_bytes() != b"x" * 100_000
