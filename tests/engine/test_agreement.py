"""A restore that ranks agree on; they are threads here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

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

    def gone(step: int) -> None:
        raise CheckpointNotFoundError(f"step {step} has been removed")

    def run(rank: int) -> None:
        ranks = Ranks(store, rank, 2, deadline_seconds=20)
        error = RankFailedError if rank else PermissionError
        with pytest.raises(error, match="may not be listed"):
            AgreedSearch(ranks, "run", steps, lambda: 0).run(gone)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert store.num_keys() <= 1, "only the count of ranks stays"
