"""Loaders with a state of their own: torchdata's, and one that only keeps to the protocol."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_stream import Flow, Numbers, OwnOrder, epoch_of, noisy_collate, same, stream_of, through_a_file
from torch.utils.data import DataLoader, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from milepost.data.stateful_loader import StatefulLoader

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it


class Minimal(DataLoader[Any]):
    """A DataLoader of its own class, which counts and skips without loading."""

    passed = resume_at = 0

    def __iter__(self) -> Iterator[Any]:
        self.passed, self.resume_at = self.resume_at, 0
        batches = iter(self.batch_sampler)  # type: ignore[arg-type]
        for number, index in enumerate(batches):
            if number >= self.passed:
                self.passed += 1
                yield self.collate_fn([self.dataset[i] for i in index])

    def state_dict(self) -> dict[str, int]:
        return {"passed": self.passed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.resume_at = state["passed"]


class Once(Flow):
    """Stays at its end: torchdata asks an ended worker again, and one that had gone back would start again."""

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
        self.position = self.size


def build(kind: str, workers: int, log: Path | None = None) -> DataLoader[Any]:
    extra: dict[str, Any] = {"num_workers": workers, "batch_size": 3}
    if workers:
        extra |= {"multiprocessing_context": "fork", "persistent_workers": kind == "persistent"}
    if kind.startswith("flow"):
        return StatefulDataLoader((Once if workers else Flow)(int(kind[4:]), log=log), **extra)
    if kind == "weighted":
        sampler = WeightedRandomSampler(torch.arange(1.0, 23.0), 22)
        return StatefulDataLoader(Numbers(log=log), sampler=sampler, **extra)
    if kind == "own":
        return StatefulDataLoader(Numbers(log=log), sampler=OwnOrder(22), collate_fn=noisy_collate, **extra)
    if kind == "seldom":
        return StatefulDataLoader(Numbers(log=log), shuffle=True, snapshot_every_n_steps=3, **extra)
    if kind == "minimal":
        return Minimal(Numbers(log=log), shuffle=True, **extra)
    return StatefulDataLoader(Numbers(log=log), shuffle=True, collate_fn=noisy_collate, **extra)


MATRIX = [("shuffle", 0), ("weighted", 0), ("own", 0), ("flow23", 0), ("flow24", 0), ("minimal", 0)]
MATRIX += [("shuffle", 2), ("weighted", 2), ("own", 2), ("flow23", 2), ("flow20", 2), ("persistent", 2), ("seldom", 2)]


@pytest.mark.parametrize(("kind", "workers"), MATRIX)
def test_goes_on_exactly(kind: str, workers: int) -> None:
    def seeded() -> Any:
        torch.manual_seed(0)  # torchdata seeds the sampler where the loader is made
        return stream_of(build(kind, workers))

    unbroken = seeded()
    assert isinstance(unbroken._sources[0], StatefulLoader)
    expected = [epoch_of(unbroken, epoch) for epoch in range(3)]
    unbroken.close()
    assert not same(expected[0], expected[1])
    for cut in (1, 4, len(expected[1]) - 1, len(expected[1])):
        first = seeded()
        epoch_of(first, 0)
        first.begin(1)
        for _ in range(cut):
            next(first)
        state = through_a_file(first.state_dict())
        first.close()
        torch.manual_seed(cut), random.seed(cut), np.random.seed(cut)
        second = stream_of(build(kind, workers))
        second.load_state_dict(state)
        assert same(epoch_of(second, 1), expected[1][cut:]), f"cut after {cut}"
        assert same(epoch_of(second, 2), expected[2]), f"epoch after the cut at {cut}"
        second.close()


@pytest.mark.parametrize(("kind", "workers"), [("shuffle", 0), ("shuffle", 2), ("flow23", 0), ("flow23", 2)])
def test_loads_nothing_twice(kind: str, workers: int, tmp_path: Path) -> None:
    first = stream_of(build(kind, workers))
    first.begin(0)
    seen = [next(first)[0] for _ in range(4)]
    log = tmp_path / "loaded"
    second = stream_of(build(kind, workers, log))
    second.load_state_dict(first.state_dict())
    rest = [batch for batch, _, _ in epoch_of(second, 0)]
    first.close(), second.close()
    loaded = log.read_text().split()
    assert len(loaded) == len(set(loaded)) == sum(map(len, rest)) == (22 if kind == "shuffle" else 23) - 12
    assert len(seen) == 4


@pytest.mark.parametrize(("kind", "workers"), [("shuffle", 0), ("shuffle", 2), ("own", 0), ("flow23", 2)])
def test_leaves_the_random_state_and_the_loader_alone(kind: str, workers: int) -> None:
    loader = build(kind, workers)
    samplers = loader.batch_sampler, loader.sampler
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    stream = stream_of(loader)
    epoch_of(stream, 0)
    stream.close()
    assert same((torch.rand(3), random.random(), np.random.rand()), expected)
    assert (loader.batch_sampler, loader.sampler) == samplers
