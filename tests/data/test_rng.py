from __future__ import annotations

import io
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from milepost._distributed import OfAllRanks
from milepost.data.rng import RandomState, RngState, derived_seed, isolated_rng, run_seed, seed_everything
from milepost.errors import MisconfigurationException


def draws() -> tuple[float, ...]:
    return (
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        torch.rand(()).item(),
        torch.randn(()).item(),
    )


def test_state_goes_through_a_file_that_runs_no_code() -> None:
    draws()  # leaves half a pair of normal numbers cached in Python and NumPy
    file = io.BytesIO()
    torch.save(RngState.capture().state_dict(), file)
    expected = draws(), draws()
    file.seek(0)
    RngState.from_state_dict(torch.load(file, weights_only=True)).restore()
    assert (draws(), draws()) == expected


def test_isolated_rng_leaves_the_callers_state_even_after_an_error() -> None:
    expected_from = RngState.capture()
    expected = draws()
    expected_from.restore()
    with pytest.raises(KeyError), isolated_rng():
        torch.manual_seed(0)
        draws()
        raise KeyError
    assert draws() == expected


def test_run_seed_depends_on_torch_and_consumes_nothing() -> None:
    torch.manual_seed(3)
    seed = run_seed()
    assert run_seed() == seed and 0 <= seed < 2**63
    first = torch.rand(())
    assert run_seed() != seed
    torch.manual_seed(3)
    assert torch.equal(torch.rand(()), first)


def test_derived_seed_is_the_same_in_every_process() -> None:
    program = "from milepost.data.rng import derived_seed; print(derived_seed(7, 0, 'base'))"
    environment = {**os.environ, "PYTHONHASHSEED": "5", "PYTHONPATH": "src"}
    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert int(told.stdout) == derived_seed(7, 0, "base")
    assert derived_seed(1, 23) != derived_seed(12, 3)


def test_seed_everything_seeds_all_and_tells_child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    with isolated_rng():
        assert seed_everything(workers=True) == 11
        expected = draws()
        assert seed_everything(12) == 12
        assert draws() != expected
        assert os.environ["PL_GLOBAL_SEED"] == "12" and os.environ["PL_SEED_WORKERS"] == "0"
        seed_everything(11)
        assert draws() == expected
    with pytest.raises(MisconfigurationException, match="4294967296"):
        seed_everything(2**32)


@pytest.mark.parametrize("value", [None, "many"])
def test_seed_everything_falls_back_to_zero_and_says_so(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setenv("PL_GLOBAL_SEED", value or "0")
    if value is None:
        monkeypatch.delenv("PL_GLOBAL_SEED")
    with isolated_rng(), pytest.warns(UserWarning, match="PL_GLOBAL_SEED"):
        assert seed_everything() == 0


def test_of_many_random_states_a_rank_takes_its_own_or_begins_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append((RandomState().state_dict(), torch.rand(2)))
    all_ranks = OfAllRanks(tuple(state for state, _ in states))
    drawn = []
    for rank in range(4):
        monkeypatch.setattr("milepost._distributed.rank", lambda rank=rank: rank)
        for _ in range(2):
            RandomState().load_state_dict(all_ranks)
            drawn.append(torch.rand(2))
    assert torch.equal(drawn[0], states[0][1]) and torch.equal(drawn[2], states[1][1])
    assert all(torch.equal(drawn[n], drawn[n + 1]) for n in range(0, 8, 2))
    assert len({tuple(each.tolist()) for each in drawn}) == 4
