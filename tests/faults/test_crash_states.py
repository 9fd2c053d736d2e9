"""After a crash at any moment the old or the new checkpoint is there, whole, and the next save works.

A sample of the states; ``python tests/faults/crash_scenarios.py`` goes through all of them.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_scenarios import SCENARIOS, Scenario, check_all, memory_directory, recorded, saved

from milepost.testing import RecordingStore, crash_states
from milepost.testing.recording import Data, Entries, Sync


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    made = memory_directory(tmp_path)
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_every_crash_leaves_the_old_or_the_new_one(scenario: Scenario, root: Path) -> None:
    store = recorded(scenario, root / "recorded")
    states = list(crash_states(store, reorderings=1, samples=2, seed=1))
    chosen = random.Random(2).sample(states, min(len(states), 25))
    assert check_all(scenario, root, chosen) >= 11


def test_the_replay_finds_a_save_that_forgets_to_make_its_files_durable(root: Path) -> None:
    """Of a recording without the fsyncs of files some state is torn, and the check says which."""
    scenario = SCENARIOS[0]
    store = recorded(scenario, root / "recorded")
    store.log = [o for o in store.log if not (isinstance(o, Sync) and o.inode in files_of(store))]
    with pytest.raises(Exception, match=r".") as caught:
        check_all(scenario, root, crash_states(store, reorderings=1))
    assert any("crashed after" in note for note in caught.value.__notes__)


def test_the_replay_finds_a_save_that_forgets_to_make_its_names_durable(root: Path) -> None:
    scenario = SCENARIOS[0]
    store = recorded(scenario, root / "recorded")
    store.log = [o for o in store.log if not isinstance(o, Sync) or o.inode in files_of(store)]
    with pytest.raises(AssertionError, match="version 0 of"):
        check_all(scenario, root, crash_states(store, reorderings=0))


def files_of(store: RecordingStore) -> set[int]:
    return {o.file for o in store.log if isinstance(o, Data)}


def test_states_are_laid_out_as_they_were_recorded(root: Path) -> None:
    """Without a crash the last state is the directory itself: names, bytes and links."""
    (root / "recorded").mkdir()
    store = RecordingStore(root / "recorded")
    saved(root / "recorded" / "run", (1, 1), (2, 2), store=store)
    *_, last = crash_states(store, reorderings=0)
    last.write_to(root / "again")
    one, other = (as_written(root / name) for name in ("recorded", "again"))
    assert one == other and any(isinstance(o, Entries) and o.told.startswith("link") for o in store.log)


def as_written(directory: Path) -> dict[str, tuple[bytes, int]]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return {str(p.relative_to(directory)): (p.read_bytes(), p.stat().st_nlink) for p in found}
