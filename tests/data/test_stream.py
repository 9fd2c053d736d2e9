from __future__ import annotations

import io
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from milepost.data.stream import BatchStream, CombinedLoader
from milepost.errors import MisconfigurationException


class Numbers(Dataset):
    """Sample i, noised by all three generators; appends i to a log file when loaded."""

    def __init__(self, size: int = 22, log: Path | None = None, noise: bool = True) -> None:
        self.size, self.log, self.noise = size, log, noise

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{index}\n")
        if not self.noise:
            return torch.tensor([float(index)])
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)


def noisy_collate(samples: list[torch.Tensor]) -> torch.Tensor:
    batch = default_collate(samples)
    return batch + torch.rand_like(batch) + random.random() + np.random.rand()


class OwnOrder(Sampler):
    """Draws from the global generators and from one of its own, one index at a time."""

    def __init__(self, size: int) -> None:
        self.size, self.own, self.array = size, random.Random(3), np.random.default_rng(4)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.size):
            drawn = self.own.randrange(99) + int(self.array.integers(99)) + int(torch.randint(99, ()).item())
            yield (drawn + random.randrange(99) + np.random.randint(99)) % self.size


class Flow(IterableDataset):
    """Counts up, with a position that can be saved; workers share the numbers."""

    def __init__(self, size: int = 23, log: Path | None = None) -> None:
        self.size, self.position, self.log = size, 0, log

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        while first + self.position * step < self.size:
            value = first + self.position * step
            self.position += 1
            if self.log is not None:
                with self.log.open("a") as file:
                    file.write(f"{value}\n")
            yield torch.tensor([value, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def make_loader(kind: str, workers: int, log: Path | None = None) -> DataLoader:
    extra: dict[str, Any] = {"num_workers": workers, "batch_size": 3}
    if workers:
        extra |= {"multiprocessing_context": "fork", "persistent_workers": kind.startswith("persistent")}
    if kind.endswith("flow"):
        return DataLoader(Flow(log=log), **extra)
    data = Numbers(log=log)
    if kind == "weighted":
        return DataLoader(data, sampler=WeightedRandomSampler(torch.arange(1.0, 23.0), 22), **extra)
    if kind == "own":
        return DataLoader(data, sampler=OwnOrder(22), collate_fn=noisy_collate, **extra)
    if kind == "generator":
        return DataLoader(data, shuffle=True, generator=torch.Generator().manual_seed(5), **extra)
    if kind == "unbatched":
        return DataLoader(data, shuffle=True, **extra | {"batch_size": None})
    return DataLoader(data, shuffle=True, collate_fn=noisy_collate, **extra)


def stream_of(loaders: Any, mode: str = "max_size_cycle", limits: Any = None, seed: int = 7) -> BatchStream:
    return BatchStream(loaders, mode=mode, limits=limits, seed=seed)


def epoch_of(stream: BatchStream, epoch: int) -> list[Any]:
    stream.begin(epoch)
    return list(stream)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return left == right


KINDS = ["shuffle", "weighted", "own", "generator", "unbatched", "flow"]
MATRIX = [(kind, workers) for kind in KINDS for workers in (0, 2)] + [("persistent", 2), ("persistent flow", 2)]


@pytest.mark.parametrize(("kind", "workers"), MATRIX)
def test_goes_on_with_exactly_the_batches_of_the_unbroken_run(kind: str, workers: int) -> None:
    unbroken = stream_of(make_loader(kind, workers))
    expected = [epoch_of(unbroken, epoch) for epoch in range(3)]
    unbroken.close()
    assert not same(expected[0], expected[1])
    for cut in (1, 4, len(expected[1]) - 1, len(expected[1])):
        first = stream_of(make_loader(kind, workers))
        epoch_of(first, 0)
        first.begin(1)
        for _ in range(cut):
            next(first)
        state = through_a_file(first.state_dict())
        first.close()
        torch.manual_seed(cut), random.seed(cut), np.random.seed(cut)  # a new process has other random state
        second = stream_of(make_loader(kind, workers))
        second.load_state_dict(state)
        assert same(epoch_of(second, 1), expected[1][cut:]), f"cut after {cut}"
        assert same(epoch_of(second, 2), expected[2]), f"epoch after the cut at {cut}"
        second.close()


@pytest.mark.parametrize("size", [19, 20, 21])
def test_a_worker_that_has_ended_stays_so(size: int) -> None:
    def build() -> BatchStream:
        return stream_of(DataLoader(Flow(size), batch_size=3, num_workers=2, multiprocessing_context="fork"))

    unbroken = build()
    expected = epoch_of(unbroken, 0)
    unbroken.close()
    for cut in range(len(expected) - 3, len(expected)):
        first, second = build(), build()
        first.begin(0)
        for _ in range(cut):
            next(first)
        second.load_state_dict(through_a_file(first.state_dict()))
        assert same(epoch_of(second, 0), expected[cut:]), f"cut after {cut}"
        first.close(), second.close()  # torch waits seconds for workers that are left to the garbage collector


@pytest.mark.parametrize("kind", ["shuffle", "flow"])
@pytest.mark.parametrize("workers", [0, 2])
def test_loads_nothing_again(kind: str, workers: int, tmp_path: Path) -> None:
    first = stream_of(make_loader(kind, workers))
    first.begin(0)
    seen = [next(first)[0] for _ in range(4)]
    log = tmp_path / "loaded"
    second = stream_of(make_loader(kind, workers, log))
    second.load_state_dict(first.state_dict())
    rest = [batch for batch, _, _ in epoch_of(second, 0)]
    first.close(), second.close()
    loaded = [int(line) for line in log.read_text().split()]
    size = 22 if kind == "shuffle" else 23
    assert len(loaded) == len(set(loaded)) == size - sum(map(len, seen)) == sum(map(len, rest))


@pytest.mark.parametrize(("kind", "workers"), MATRIX)
def test_leaves_the_random_state_of_the_process_alone(kind: str, workers: int) -> None:
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    stream = stream_of(make_loader(kind, workers))
    epoch_of(stream, 0)
    stream.close()
    assert same((torch.rand(3), random.random(), np.random.rand()), expected)


def test_a_worker_count_does_not_change_the_batches_of_a_map_dataset() -> None:
    assert same(epoch_of(stream_of(make_loader("own", 0)), 0), epoch_of(stream_of(make_loader("own", 2)), 0))


def test_other_seed_or_rank_other_noise() -> None:
    base, other = (epoch_of(stream_of(make_loader("shuffle", 0), seed=seed), 0) for seed in (1, 2))
    ranked = epoch_of(BatchStream(make_loader("shuffle", 0), mode="max_size", limits=None, seed=1, rank=1), 0)
    assert not same(base, other) and not same(base, ranked)


def test_the_user_sees_the_own_dataset_in_worker_init_fn(tmp_path: Path) -> None:
    def note(worker: int) -> None:
        (tmp_path / str(worker)).write_text(type(get_worker_info().dataset).__name__)

    loader = DataLoader(Flow(), batch_size=3, num_workers=2, worker_init_fn=note, multiprocessing_context="fork")
    epoch_of(stream_of(loader), 0)
    assert [(tmp_path / str(worker)).read_text() for worker in (0, 1)] == ["Flow", "Flow"]


def plain(size: int, batch_size: int = 2) -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(size)), batch_size=batch_size)


def test_lengths_and_limits() -> None:
    assert stream_of(plain(10)).num_batches == 5
    assert stream_of(plain(10), limits=3).num_batches == 3
    assert stream_of(plain(10), limits=0.5).num_batches == 2
    assert stream_of([plain(10), plain(4)], mode="sequential", limits=3).num_batches == [3, 2]
    assert stream_of([plain(10), plain(4)]).num_batches == 5
    assert stream_of([plain(10), plain(4)], mode="min_size").num_batches == 2
    assert stream_of(DataLoader(Flow(), batch_size=2)).num_batches == float("inf")
    assert len(epoch_of(stream_of(plain(10), limits=3), 0)) == 3
    with pytest.raises(MisconfigurationException, match="length is unknown"):
        stream_of(DataLoader(Flow(), batch_size=2), limits=0.5)
    with pytest.raises(MisconfigurationException, match="leaves none"):
        stream_of(plain(10), limits=0.01)


@pytest.mark.parametrize("loader", [plain(9), DataLoader(Flow(9), batch_size=2)], ids=["known", "unknown"])
def test_is_last_on_the_last_batch_only(loader: DataLoader) -> None:
    stream = stream_of(loader)
    stream.begin(0)
    assert [stream.is_last for _ in stream] == [False] * 4 + [True]


def test_sequential_visits_one_loader_after_the_other() -> None:
    stream = stream_of([plain(4), DataLoader(Flow(3), batch_size=2), plain(2)], mode="sequential")
    assert [(index, loader) for _, index, loader in epoch_of(stream, 0)] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]


@pytest.mark.parametrize(("mode", "count"), [("max_size_cycle", 8), ("min_size", 3), ("max_size", 8)])
@pytest.mark.parametrize("unknown", [False, True])
def test_several_loaders_go_on_exactly(mode: str, count: int, unknown: bool) -> None:
    def build() -> BatchStream:
        long = DataLoader(Flow(22) if unknown else Numbers(22), batch_size=3)
        short = DataLoader(Numbers(5), batch_size=2, shuffle=True)
        return stream_of(CombinedLoader({"a": long, "b": [short]}, mode))

    expected = epoch_of(build(), 2)
    assert len(expected) == count
    assert all(set(batch) == {"a", "b"} and isinstance(batch["b"], list) for batch, _, _ in expected)
    for cut in range(1, count):
        first, second = build(), build()
        first.begin(2)
        for _ in range(cut):
            next(first)
        second.load_state_dict(through_a_file(first.state_dict()))
        assert same(epoch_of(second, 2), expected[cut:]), f"cut after {cut}"


@pytest.mark.parametrize(("kind", "workers"), [("generator", 0), ("generator", 2), ("persistent", 2), ("own", 2)])
def test_goes_on_exactly_under_a_limit(kind: str, workers: int) -> None:
    unbroken = stream_of(make_loader(kind, workers), limits=5)
    expected = [epoch_of(unbroken, epoch) for epoch in range(2)]
    unbroken.close()
    assert len(expected[0]) == 5
    for cut in (2, 5):
        first, second = (stream_of(make_loader(kind, workers), limits=5) for _ in range(2))
        first.begin(0)
        for _ in range(cut):
            next(first)
        second.load_state_dict(through_a_file(first.state_dict()))
        assert same(epoch_of(second, 0), expected[0][cut:])
        assert same(epoch_of(second, 1), expected[1])
        first.close(), second.close()


def test_sequential_goes_on_exactly() -> None:
    def build() -> BatchStream:
        return stream_of([make_loader("shuffle", 0), DataLoader(Flow(5), batch_size=2), plain(4)], mode="sequential")

    expected = epoch_of(build(), 0)
    assert len(expected) == 13
    for cut in range(1, 13):
        first, second = build(), build()
        first.begin(0)
        for _ in range(cut):
            next(first)
        second.load_state_dict(through_a_file(first.state_dict()))
        assert same(epoch_of(second, 0), expected[cut:]), f"cut after {cut}"


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="zigzag"):
        CombinedLoader([], "zigzag")


@pytest.mark.slow
def test_spawned_workers_go_on_exactly() -> None:
    def build() -> BatchStream:
        return stream_of(DataLoader(Flow(), batch_size=3, num_workers=2, multiprocessing_context="spawn"))

    expected = epoch_of(build(), 0)
    assert same(expected, epoch_of(stream_of(make_loader("flow", 2)), 0))
    first, second = build(), build()
    first.begin(0)
    for _ in range(3):
        next(first)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert same(epoch_of(second, 0), expected[3:])


class Stateless(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


@pytest.mark.parametrize("loader", [DataLoader(Stateless(), batch_size=2), [[1], [2], [3], [4], [5]]])
def test_warns_where_batches_must_be_read_again(loader: Any) -> None:
    wrapped = CombinedLoader(Batches(loader) if isinstance(loader, list) else loader, "max_size")
    expected = epoch_of(stream_of(wrapped), 0)
    first, second = stream_of(wrapped), stream_of(wrapped)
    first.begin(0)
    next(first), next(first)
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="load_state_dict"):
        second.begin(0)
    assert same(list(second), expected[2:])


class Batches:
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def test_warns_of_a_generator_that_the_dataset_keeps_to_itself() -> None:
    loader = make_loader("shuffle", 0)
    loader.dataset.rng = np.random.default_rng(0)
    first = stream_of(loader)
    first.begin(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(first)
    second = stream_of(loader)
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match=r"Numbers\.rng"):
        second.begin(0)


def test_a_loader_that_cannot_be_iterated_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="train_dataloader returned 3"):
        stream_of(3)
