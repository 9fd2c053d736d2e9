"""A restore that ranks agree on; they are threads here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from milepost import Checkpointer
from milepost.engine import agreement
from milepost.engine.agreement import AgreedSearch
from milepost.engine.votes import Ranks
from milepost.errors import CheckpointNotFoundError, RankFailedError


def test_a_restore_that_fails_leaves_nothing_in_the_store() -> None:
    store = dist.HashStore()
    listings = [[1]]

    def steps() -> list[int]:
        if not listings:
            raise PermissionError("the directory may not be listed")
        return listings.pop()

    def gone(step: int) -> str:
        raise CheckpointNotFoundError(f"step {step} has been removed")

    def run(rank: int) -> None:
        ranks = Ranks(store, rank, 2, deadline_seconds=20)
        error = RankFailedError if rank else PermissionError
        with pytest.raises(error, match="may not be listed"):
            AgreedSearch(ranks, "run", steps, lambda: 0).run(gone)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert store.num_keys() <= 1, "only the count of ranks stays"


class Then:
    """An object in a state that calls `then` when it is restored."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.then = then

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}

    def load_state_dict(self, found: dict[str, Any]) -> None:
        self.then()


@pytest.mark.parametrize("only", [None, 1])
def test_all_restore_the_same_commit_of_a_step_that_is_saved_again_meanwhile(tmp_path: Path, only: int | None) -> None:
    """Rank 0 has read the first commit when the second one is made, and rank 1 begins after that."""
    store, replaced = dist.HashStore(), threading.Event()

    def save(value: float) -> None:
        with Checkpointer(tmp_path, background=False, threads=1, ranks=None) as c:
            c.save(1, {"model": torch.full((5,), value), "object": Then()})

    def replace() -> None:
        if not replaced.is_set():
            save(2.0)
            replaced.set()

    def run(rank: int) -> tuple[int, float]:
        live = {"model": torch.zeros(5), "object": Then(replace)}
        if rank:
            assert replaced.wait(20)
        with Checkpointer(tmp_path, threads=1, ranks=Ranks(store, rank, 2, deadline_seconds=20)) as c:
            return c.restore(live, only), float(live["model"][0])

    save(1.0)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [(1, 2.0)] * 2
    assert store.num_keys() <= 1


def test_ranks_that_never_find_the_same_commit_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_PAUSE_SECONDS", 0.0)
    store = dist.HashStore()

    def run(rank: int) -> None:
        ranks = Ranks(store, rank, 2, deadline_seconds=20)
        with pytest.raises(RankFailedError, match="rank 1 failed: it has not restored rank 0's checkpoint of step 1"):
            AgreedSearch(ranks, "run", lambda: [1], lambda: 0).run(lambda step: f"of rank {rank}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert store.num_keys() <= 1
