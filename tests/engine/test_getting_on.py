"""A rank that reads and compares, and calls the store for none of it, shows that it gets on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from milepost import Checkpointer
from milepost.engine.planner import VERIFY_EVERY
from milepost.engine.rank_save import RankSaving
from milepost.engine.requests import CHUNK_BYTES
from milepost.engine.staging import LiveImage, Source
from milepost.engine.state import Flattened
from milepost.engine.votes import Ranks
from milepost.testing.faulty_store import FaultyStore


def test_each_chunk_that_is_verified_digested_or_compared_counts(tmp_path: Path) -> None:
    live = {"model": torch.zeros(2 * CHUNK_BYTES + 1000, dtype=torch.uint8), "other": torch.zeros(3)}
    store, ranks = FaultyStore(), Ranks(dist.HashStore(), 0, 1)
    with Checkpointer(tmp_path, ranks=ranks, threads=1, background=False, store=store) as c:
        c.save(1, live)
        engine = c._engine
        last = engine._last
        assert last is not None
        due = [replace(e, blob=msgspec.structs.replace(e.blob, verified=VERIFY_EVERY)) for e in last.blobs]
        flattened = Flattened(live, ranks=True)
        blobs = engine._rank_plans.plan(flattened, 0, 1)
        plans = blobs.bound(flattened)
        images = [LiveImage(Source(plan)) for plan in plans]
        saving = RankSaving(
            store, engine._started(), flattened, blobs, plans, images, replace(last, blobs=tuple(due)),
            ranks.meeting("2"),
        )  # fmt: skip
        before = len(store.calls)
        saving.run(str(tmp_path / "step-00000002"), 2, {})
    name = max(last.blobs, key=lambda each: each.blob.bytes).blob.name
    assert (tmp_path / "step-00000002" / name).stat().st_nlink == 2, "it was linked: digested and verified"
    assert saving._store.count - (len(store.calls) - before) >= 2 * 3
