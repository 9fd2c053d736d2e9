"""Iterable datasets in loader workers: seeded batch by batch, and handing their state back with every batch."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils.pin_memory import pin_memory

from milepost.data.rng import derived_seed, seed_all

_epoch_seed = 0  # in a worker: seed of the epoch whose index arrived last


class EpochIndex:
    """An index list for an iterable dataset; unpickling it tells the worker the seed of the epoch."""

    def __init__(self, index: Any, seed: int) -> None:
        self._index, self._seed = index, seed

    def __reduce__(self) -> Any:
        return _in_epoch, (self._index, self._seed)


def _in_epoch(index: Any, seed: int) -> Any:
    global _epoch_seed
    _epoch_seed = seed
    return index


class _Filler:
    """Stands for a sample where a worker is to give its turn away."""


class SkippedTurn:
    """A batch that is none: on going on, workers that come before the next one in the rotation yield it first."""


class WorkerBatch:
    """A batch, the worker that made it, and that worker's state after it."""

    def __init__(self, batch: Any, worker: int, state: Any) -> None:
        self.batch, self.worker, self.state = batch, worker, state

    def pin_memory(self) -> WorkerBatch:
        return WorkerBatch(pin_memory(self.batch), self.worker, self.state)  # type: ignore[no-untyped-call]


class WorkerDataset(IterableDataset[Any]):
    """Wraps the user's iterable dataset inside a worker.

    Args:
        inner: the user's dataset.
        batch_size: samples per batch, 1 where the loader does not batch.
    """

    def __init__(self, inner: Any, batch_size: int) -> None:
        self.inner, self._batch_size = inner, batch_size
        self.states: dict[int, Any] = {}  # of each worker, to go on from; used by its first iteration only
        self.skips = 0  # workers below this number give their first turn away
        self.batches = 0
        self.ended = (
            False  # seen while filling a last, shorter batch: the dataset's own state may be that of a new start
        )

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # while unpickling there is nothing yet to delegate to
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __iter__(self) -> Iterator[Any]:
        worker = _reveal(self.inner)
        state, skip = self.states.get(worker), worker < self.skips
        self.states, self.skips = {}, 0
        return self._samples(worker, state, skip)

    def _samples(self, worker: int, state: Any, skip: bool) -> Iterator[Any]:
        self.batches = 0 if state is None else state["batches"]
        if state is not None and state["dataset"] is not None:
            self.inner.load_state_dict(state["dataset"])
        if skip:
            for _ in range(self._batch_size):
                yield _Filler()
        self.ended = state is not None and state["ended"]
        if self.ended:
            return
        seed_all(derived_seed(_epoch_seed, worker, "iterator"))
        samples, position = iter(self.inner), 0
        while True:
            if position % self._batch_size == 0:
                seed_all(derived_seed(_epoch_seed, worker, self.batches))
                self.batches += 1
            position += 1
            try:
                sample = next(samples)
            except StopIteration:
                self.ended = True
                return
            yield sample


class WorkerCollate:
    """Wraps the user's collate function inside a worker."""

    def __init__(self, collate: Callable[[Any], Any], dataset: WorkerDataset) -> None:
        self._collate, self._dataset = collate, dataset

    def __call__(self, samples: Any) -> Any:
        if isinstance(samples[0] if isinstance(samples, list) and samples else samples, _Filler):
            return SkippedTurn()
        info: Any = get_worker_info()
        dataset = _wrapper_of_worker(self._dataset)
        inner = dataset.inner
        batch = self._collate(samples)
        state = copy.deepcopy(inner.state_dict()) if is_stateful(inner) else None
        return WorkerBatch(batch, info.id, {"batches": dataset.batches, "dataset": state, "ended": dataset.ended})


class Unterminated:
    """Wraps the user's ``worker_init_fn`` where several ranks train: they stop at a step that all of them reach.

    A launcher sends SIGTERM to whole process groups. Workers go when the process that they work for does.
    """

    def __init__(self, user_function: Callable[[int], None] | None) -> None:
        self._user_function = user_function

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self._user_function is not None:
            self._user_function(worker)


class WorkerInit:
    """Wraps the user's ``worker_init_fn``, which is to see the dataset that the user knows."""

    def __init__(self, user_function: Callable[[int], None] | None) -> None:
        self._user_function = user_function

    def __call__(self, worker: int) -> None:
        global _worker_dataset
        info: Any = get_worker_info()
        _worker_dataset = info.dataset
        _reveal(info.dataset.inner)
        if self._user_function is not None:
            self._user_function(worker)


_worker_dataset: WorkerDataset | None = None


def _wrapper_of_worker(default: WorkerDataset) -> WorkerDataset:
    # under spawn the two are pickled apart: the collate function's copy of the dataset is not the one iterated
    return default if _worker_dataset is None else _worker_dataset


def _reveal(inner: Any) -> int:
    info: Any = get_worker_info()
    object.__setattr__(info, "dataset", inner)  # the class refuses plain assignment
    return int(info.id)


def is_stateful(dataset: Any) -> bool:
    """Whether a position can be taken from `dataset` and given back."""
    return hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
