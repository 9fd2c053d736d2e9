"""Samples divided among ranks: as torch divides them, and none lost or read twice when the number of ranks changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, TensorDataset

from milepost.data.division import division_of
from milepost.data.stream import BatchStream
from milepost.errors import MisconfigurationException, ResumeError


def loader(samples: int, batch_size: int = 2, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(samples)), batch_size=batch_size, **options)


def streams(data: Any, ranks: int, keep: bool = False) -> list[BatchStream]:
    made = []
    for rank in range(ranks):

        def divide(item: Any, rank: int = rank) -> Any:
            return division_of(item, rank, ranks, seed=3, keep=keep) if ranks > 1 else None

        made.append(BatchStream(data, mode="max_size_cycle", limits=None, seed=5, rank=rank, divide=divide))
    return made


def read(stream: BatchStream, batches: int | None = None) -> list[int]:
    found: list[int] = []
    for number in range(10**6):
        if number == batches or stream.is_last:
            return found
        found += next(stream)[0][0].tolist()
    raise AssertionError("endless")


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("samples", [1, 7, 12])
def test_as_torch_divides(samples: int, shuffle: bool) -> None:
    data = loader(samples, shuffle=shuffle)
    for rank, stream in enumerate(streams(data, 3)):
        sampler: Any = DistributedSampler(data.dataset, 3, rank, shuffle, 3)
        sampler.set_epoch(4)
        stream.begin(4)
        assert read(stream) == list(sampler)
        assert stream.num_batches == len(loader(samples, sampler=sampler))


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(8, 60), batch_size=st.integers(1, 3), shuffle=st.booleans(),
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4), drawn=st.integers(1, 3),
)  # fmt: skip
def test_each_sample_once_among_changing_ranks(
    samples: int, batch_size: int, shuffle: bool, sizes: list[int], drawn: int
) -> None:
    """Some batches on each number of ranks, all that is left on the last."""
    from milepost.data.division import resharded

    data = loader(samples, batch_size, shuffle=shuffle)
    seen: list[int] = []
    state, before = None, 0
    for number, ranks in enumerate(sizes):
        made = streams(data, ranks)
        for stream in made:
            if state is not None:
                stream.load_state_dict(resharded(state, before))
            stream.begin(2)
        last = number == len(sizes) - 1 or any(s.num_batches - s.batches_seen <= drawn for s in made)
        parts = [read(stream, None if last else drawn) for stream in made]
        if last:  # what is padded is at the end of the longest parts
            left = samples - len(seen)
            flat = [part[n] for n in range(max(map(len, parts))) for part in parts if n < len(part)]
            assert len(flat) - left < ranks
            seen += flat[:left]
            break
        seen += [sample for part in parts for sample in part]
        state, before = made[0].state_dict(), ranks
    assert sorted(seen) == list(range(samples))


def test_predictions_are_made_once() -> None:
    made = streams(loader(7), 3, keep=True)
    for stream in made:
        stream.begin(0)
    assert sorted(sample for stream in made for sample in read(stream)) == list(range(7))


def test_a_sampler_of_the_users_says_the_same_on_every_rank() -> None:
    data = loader(9, sampler=RandomSampler(range(9), num_samples=6))
    made = streams(data, 2)
    whole = BatchStream(data, mode="max_size_cycle", limits=None, seed=5)
    for stream in (*made, whole):
        stream.begin(1)
    order = read(whole)
    assert [read(stream) for stream in made] == [order[::2], order[1::2]]


class Pairs:
    """A batch sampler that derives from nothing."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Any:
        return iter(BatchSampler(self.sampler, 2, False))

    def __len__(self) -> int:
        return (len(self.sampler) + 1) // 2


def test_a_batch_sampler_of_the_users_gets_one_ranks_samples() -> None:
    data = DataLoader(TensorDataset(torch.arange(7)), batch_sampler=Pairs(range(7)))
    made = streams(data, 2)
    for stream in made:
        stream.begin(0)
    assert [read(stream) for stream in made] == [[0, 2, 4, 6], [1, 3, 5, 0]]


def test_a_batch_sampler_without_a_sampler_is_refused() -> None:
    data = DataLoader(TensorDataset(torch.arange(4)), batch_sampler=[[0, 1], [2, 3]])
    with pytest.raises(MisconfigurationException, match="use_distributed_sampler=False"):
        streams(data, 2)


def test_samples_that_the_program_divided_are_not_divided_anew() -> None:
    from milepost.data.division import resharded

    stream = BatchStream(loader(8), mode="max_size_cycle", limits=None, seed=5)
    stream.begin(0)
    read(stream, 2)
    with pytest.raises(ResumeError, match="end of an epoch"):
        resharded(stream.state_dict(), 2)
