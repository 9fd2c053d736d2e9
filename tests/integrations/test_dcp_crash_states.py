"""A power cut at any moment of a save through DCP leaves the old or the new checkpoint, whole; the next save works.

Two ranks save in one process: their calls to writers and planners are made in the order in which DCP makes them.
"""

from __future__ import annotations

import gc
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import DefaultSavePlanner

from milepost import Checkpointer
from milepost.integrations.dcp import MilepostWriter
from milepost.testing import RecordingStore, crash_states


def save_as_two(path: Path, version: int, store: Any = None) -> None:
    """As `dcp.save` on two ranks: rank 0 has one tensor and a value, rank 1 another tensor."""
    states = [
        {"model": {"a": torch.full((500,), float(version)), "frozen": torch.arange(300.0)}, "version": version},
        {"optimizer": {"b": torch.full((700,), float(version))}},
    ]
    ranks = [(DefaultSavePlanner(), MilepostWriter(path, store=store, threads=1), state) for state in states]
    plans = []
    for rank, (planner, writer, state) in enumerate(ranks):
        writer.reset()
        planner.set_up_planner(state, writer.storage_meta(), rank == 0)
        writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
        plans.append(writer.prepare_local_plan(planner.create_local_plan()))
    (coordinator, first, _), *_ = ranks
    plans, metadata = coordinator.create_global_plan(plans)
    plans = first.prepare_global_plan(plans)
    results = [
        writer.write_data(planner.finish_plan(plan), planner).value()
        for (planner, writer, _), plan in zip(ranks, plans, strict=True)
    ]
    first.finish(metadata, results)


def found(path: Path) -> set[float]:
    """The versions in a checkpoint: one, unless it is torn."""
    with Checkpointer(path.parent, background=False) as checkpointer:
        checkpointer.verify(1)
        state = checkpointer.load(1)
    assert torch.equal(state["model"]["frozen"], torch.arange(300.0))
    return {float(state["version"]), *state["model"]["a"].tolist(), *state["optimizer"]["b"].tolist()}


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory where there is one: nothing in it has to last."""
    made = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield made
    shutil.rmtree(made)


def test_every_crash_leaves_the_old_or_the_new_one(memory: Path) -> None:
    root = memory / "recorded"
    root.mkdir()
    path = root / "run" / "step-00000001"
    save_as_two(path, 1)
    store = RecordingStore(root)
    save_as_two(path, 2, store)
    store.mark("saved")
    gc.collect()
    states = list(crash_states(store, reorderings=1, samples=2, seed=1))
    assert len(states) > 100
    seen: set[float] = set()
    for number, state in enumerate(random.Random(3).sample(states, 30)):
        copy = memory / f"state-{number}"
        state.write_to(copy)
        (version,) = found(copy / "run" / "step-00000001")
        assert version == 2 or (version == 1 and "saved" not in state.marks), str(state)
        seen.add(version)
        save_as_two(copy / "run" / "step-00000001", 3)
        gc.collect()
        assert found(copy / "run" / "step-00000001") == {3.0}, str(state)
        assert [entry.name for entry in (copy / "run").iterdir()] == ["step-00000001"], str(state)
        shutil.rmtree(copy)
    assert seen == {1.0, 2.0}
