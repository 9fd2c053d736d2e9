"""What can be resumed exactly is, without a word; what cannot says so once, and names the remedy."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_stream import Flow, Numbers, epoch_of, same, stream_of, through_a_file
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, IterDataPipe, RandomSampler, Sampler

from milepost.errors import ResumeError

FORK = {"num_workers": 2, "multiprocessing_context": "fork"}


class Stateless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(torch.arange(22.0))


class Pipe(IterDataPipe[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from torch.arange(22.0)


class OwnGenerator(Numbers):
    def __init__(self) -> None:
        super().__init__()
        self.noise_of_my_own = random.Random(0)


class Counter(Numbers):
    """Gives other samples the more it has given."""

    calls = 0

    def __init__(self) -> None:
        super().__init__(noise=False)
        self.calls = 0

    def __getitem__(self, index: int) -> torch.Tensor:
        self.calls += 1
        return super().__getitem__(index) + self.calls


class Remembering(Counter):
    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


class Bag:
    """An iterable of batches that is no DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        return iter(torch.arange(16.0).reshape(8, 2))


def resume(before: Any, after: Any, cut: int = 3) -> tuple[list[Any], list[Any], list[warnings.WarningMessage]]:
    """Batches of the unbroken epoch from `cut` on, those of the resumed one, and what was said on resuming."""
    unbroken, first = (stream_of(before()) for _ in range(2))
    expected = epoch_of(unbroken, 0)[cut:]
    first.begin(0)
    for _ in range(cut):
        next(first)
    second = stream_of(after())
    second.load_state_dict(through_a_file(first.state_dict()))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = epoch_of(second, 0)
    for stream in (unbroken, first, second):
        stream.close()
    return expected, found, told


def flow(workers: int) -> Callable[[], Any]:
    extra = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    return lambda: DataLoader(Flow(), batch_size=2, **extra)


INEXACT: dict[str, tuple[Callable[[], Any], Callable[[], Any], str, str]] = {
    "iterable": (lambda: DataLoader(Stateless(), batch_size=2),) * 2
    + ("position of Stateless was not saved .* 3 batches already seen are read again", "Give the dataset `state_dict`"),
    "iterable in workers": (lambda: DataLoader(Stateless(), batch_size=2, **FORK),) * 2
    + ("position of Stateless was not saved", "Give the dataset `state_dict`"),
    "pipe": (lambda: DataLoader(Pipe(), batch_size=2),) * 2
    + ("position of Pipe was not saved", "Give the dataset `state_dict`"),
    "fewer workers": (flow(2), flow(1), "position of Flow was not saved with these 1 workers", "keep num_workers"),
    "no workers any more": (flow(2), flow(0), "not saved with these 0 workers", "keep num_workers"),
    "workers now": (flow(0), flow(2), "not saved with these 2 workers", "keep num_workers"),
    "states in workers": (lambda: DataLoader(Remembering(), batch_size=2, **FORK),) * 2
    + ("Remembering has a `state_dict`, but its copies in the 2 workers", "Use num_workers=0"),
    "a generator": (lambda: DataLoader(OwnGenerator(), batch_size=2),) * 2
    + (r"OwnGenerator\.noise_of_my_own is a random generator", "global generator"),
    "a counter": (lambda: DataLoader(Counter(), batch_size=2),) * 2
    + (r"Counter\.calls changes as samples are read", "Give the dataset `state_dict`"),
    "no loader": (Bag, Bag, "Bag has no `state_dict`: the 3 batches", "Use a torch DataLoader"),
}


@pytest.mark.parametrize("case", INEXACT)
def test_says_so_once_and_names_the_remedy(case: str) -> None:
    before, after, what, remedy = INEXACT[case]
    _, found, told = resume(before, after)
    assert found
    assert len(told) == 1
    with pytest.warns(UserWarning, match=what):
        warnings.warn(told[0].message, stacklevel=1)  # type: ignore[call-overload]
    assert remedy in str(told[0].message)


class Spelled(DataLoader[Any]):
    """A class of the user's, which changes what comes out."""

    def __iter__(self) -> Any:  # type: ignore[override]
        for batch in super().__iter__():
            yield type(self).__name__, batch


class Thirds(Sampler[list[int]]):
    """Batches of growing size, from a position that it keeps itself."""

    def __init__(self) -> None:
        self.epochs = 0

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[int]]:
        self.epochs += 1
        order = [(i * self.epochs) % 22 for i in torch.randperm(21).tolist()]
        for size in range(1, 7):
            yield [order.pop() for _ in range(size)]

    def state_dict(self) -> dict[str, int]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epochs = state["epochs"]


def draws(worker: int) -> None:
    random.random(), np.random.rand(worker + 1), torch.rand(worker + 2)


def shuffled_batches() -> BatchSampler:
    return BatchSampler(RandomSampler(range(22), generator=torch.Generator().manual_seed(6)), 4, drop_last=True)


EXACT: dict[str, Callable[[], Any]] = {
    "a class of the user's": lambda: Spelled(Numbers(), batch_size=3, shuffle=True),
    "a class of the user's, in workers": lambda: Spelled(Numbers(), batch_size=3, shuffle=True, **FORK),
    "a batch sampler": lambda: DataLoader(Numbers(), batch_sampler=shuffled_batches()),
    "a batch sampler, in workers": lambda: DataLoader(Numbers(), batch_sampler=shuffled_batches(), **FORK),
    "a batch sampler with a state": lambda: DataLoader(Numbers(), batch_sampler=Thirds()),
    "a batch sampler with a state, in workers": lambda: DataLoader(Numbers(), batch_sampler=Thirds(), **FORK),
    "worker_init_fn": lambda: DataLoader(Numbers(), batch_size=3, shuffle=True, worker_init_fn=draws, **FORK),
    "worker_init_fn, iterable": lambda: DataLoader(Flow(), batch_size=3, worker_init_fn=draws, **FORK),
    "persistent workers": lambda: DataLoader(
        Numbers(), batch_size=3, persistent_workers=True, prefetch_factor=4, **FORK
    ),
    "a dataset that remembers": lambda: DataLoader(Remembering(), batch_size=3, shuffle=True),
}


@pytest.mark.parametrize("case", EXACT)
def test_goes_on_without_a_word(case: str) -> None:
    expected, found, told = resume(EXACT[case], EXACT[case])
    assert same(found, expected)
    assert [str(warning.message) for warning in told] == []


def test_other_workers_do_not_matter_to_a_map_dataset() -> None:
    expected, found, told = resume(EXACT["worker_init_fn"], lambda: DataLoader(Numbers(), batch_size=3, shuffle=True))
    assert same(found, expected) and not told


def plain() -> Any:
    return DataLoader(Numbers(), batch_size=3)


def generated() -> Any:
    return DataLoader(Numbers(), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("before", "after"), [(generated, lambda: [generated(), plain()]), (generated, plain)])
def test_other_loaders_begin_the_next_epoch_but_cannot_go_on_inside_one(before: Any, after: Any) -> None:
    first = stream_of(before())
    first.begin(0)
    next(first)
    inside, between = first.state_dict(), first.resting_state()
    second = stream_of(after())
    second.load_state_dict(inside)
    with pytest.raises(ResumeError, match=r"positions of 1 loaders|had 1 generators"):
        second.begin(0)
    third = stream_of(after())
    with pytest.warns(UserWarning, match="gives other loaders than before") as told:
        third.load_resting_state(between)
    assert len(told) == 1
    assert len(epoch_of(third, 1)) == 8
