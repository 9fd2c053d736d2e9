"""Damage is found and named, wherever it is: ``python tests/faults/corruption.py`` does it ten thousand times."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from corruption import KINDS, Directory, File, Form, sound, trials
from crash_scenarios import memory_directory


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    made = memory_directory(tmp_path)
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize("kind", [Directory, File])
def test_every_damage_is_found_and_named_and_nothing_sound_is_accused(kind: type[Form], root: Path) -> None:
    form = kind(root / "checkpoints")
    done = trials(form, 100)
    assert all(done[name] for name in KINDS)
    sound(form, 20)
