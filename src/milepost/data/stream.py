"""The batches of an epoch, at a position that can be saved and gone back to without loading anything again."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils._pytree import tree_flatten, tree_unflatten

from milepost.data.rng import RngState, derived_seed, isolated_rng, seed_all
from milepost.errors import MisconfigurationException

MODES = ("max_size_cycle", "min_size", "max_size", "sequential")


class CombinedLoader:
    """Several loaders read together: see the modes of `BatchStream`."""

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in MODES:
            raise ValueError(f"CombinedLoader(mode={mode!r}): use one of {', '.join(MODES)}.")
        self.iterables = iterables
        self.mode = mode


class SeededIndex:
    """An index on its way to a loader worker. Unpickling it there, right before the fetch, seeds that worker.

    So what a worker draws depends on the batch alone: not on how many workers there are, or what they did before.
    """

    def __init__(self, index: Any, seed: int) -> None:
        self._index, self._seed = index, seed

    def __reduce__(self) -> Any:
        return _seeded, (self._index, self._seed)


def _seeded(index: Any, seed: int) -> Any:
    seed_all(seed)
    return index


class _Indices:
    """Replaces a loader's batch sampler: the user's indices, from a position on, tagged with a seed for each batch."""

    def __init__(self, source: TrackedLoader) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source.sampler)

    def __iter__(self) -> Iterator[Any]:
        source = self._source
        indices = source.indices()
        for batch_idx, index in enumerate(indices):
            if batch_idx < source.start:
                continue
            yield SeededIndex(index, source.batch_seed(batch_idx)) if source.loader.num_workers else index


class TrackedLoader:
    """One torch DataLoader, driven so that its position is known and its randomness depends on seed, epoch and batch only.

    The user's loader is left alone: a shallow copy, of the same class, gets our index stream in the place of its sampler.
    """

    def __init__(self, loader: DataLoader[Any], *, seed: int, rank: int, number: int) -> None:
        self.loader = loader
        self._parts = (seed, rank, number)
        self.iterable = isinstance(loader.dataset, IterableDataset)
        self.batched = loader.batch_sampler is not None
        self.sampler: Any = loader.batch_sampler if self.batched else loader.sampler
        self.epoch = self.cycle = 0
        self.start = 0  # index lists to pass over
        self.seen = 0
        self._pending_state: dict[str, Any] | None = None
        self._epoch_generators: list[Any] = []
        self._dataset_state: Any = None
        self._iterator: Any = None
        self._copy: Any = None

    def batch_seed(self, batch_idx: int) -> int:
        return derived_seed(*self._parts, self.epoch, self.cycle, batch_idx)

    def indices(self) -> Iterator[Any]:
        """The user's sampler, run under random state of its own that starts from this epoch's seed."""
        state: RngState | None = None
        iterator: Any = None
        while True:
            with isolated_rng():
                if state is None:
                    seed_all(derived_seed(*self._parts, self.epoch, self.cycle, "sampler"))
                    iterator = iter(self.sampler)
                else:
                    state.restore()
                try:
                    index = next(iterator)
                except StopIteration:
                    return
                state = RngState.capture()
            yield index
            if _draws_only_at_first(self.sampler):  # torch's own: no need to swap random state for every batch
                yield from iterator
                return

    def begin(self, epoch: int, cycle: int = 0) -> None:
        """Start `epoch` (for the `cycle`-th time in it), or go on where the loaded state stands."""
        loaded, self._pending_state = self._pending_state, None
        self.epoch = epoch if loaded is None else loaded.get("epoch", epoch)
        self.cycle = cycle if loaded is None else loaded.get("cycle", 0)
        self._dataset_state = None
        self.seen = 0 if loaded is None else loaded["batches_seen"]
        self.start = self.seen
        for part in (self.loader.sampler, self.loader.batch_sampler, getattr(self.loader.batch_sampler, "sampler", None), self.loader.dataset):
            set_epoch = getattr(part, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(self.epoch)
        generators = _generators_of(self.loader)
        if loaded is not None and loaded.get("generators"):
            for generator, state in zip(generators, loaded["generators"], strict=True):
                _set_generator(generator, state)
        self._epoch_generators = [_generator_state(g) for g in generators]
        if loaded is not None and self.iterable:
            self._restore_iterable(loaded)
        self._iterator = self._make_iterator()

    def _restore_iterable(self, loaded: dict[str, Any]) -> None:
        dataset: Any = self.loader.dataset
        self.start = 0
        if loaded.get("dataset") is not None and self.loader.num_workers == 0:
            dataset.load_state_dict(copy.deepcopy(loaded["dataset"]))
            self._dataset_state = loaded["dataset"]
        elif self.seen:
            warnings.warn(
                f"{type(dataset).__name__} has no state that could be saved"
                + (" from its worker processes" if self.loader.num_workers else "")
                + f": the {self.seen} batches already seen are read again to get back to the position. Give the dataset "
                "`state_dict` and `load_state_dict`" + (", and num_workers=0." if self.loader.num_workers else "."),
                UserWarning,
                stacklevel=2,
            )

    def _make_iterator(self) -> Iterator[Any]:
        loader = copy.copy(self.loader)
        fields = loader.__dict__
        if self.iterable:
            skip = self.seen if self._dataset_state is None else 0
            self.start = 0
            if loader.num_workers and self.batched:
                fields["batch_sampler"] = _Indices(self)
            iterator = self._drawn_from(loader, 0 if skip else self.seen)
            for _ in range(skip):
                next(iterator)
            return iterator
        fields["batch_sampler" if self.batched else "sampler"] = _Indices(self)
        return self._drawn_from(loader, self.seen)

    def _drawn_from(self, loader: DataLoader[Any], batch_idx: int) -> Iterator[Any]:
        pure = type(loader.dataset) is TensorDataset and loader.collate_fn is default_collate
        with isolated_rng():  # a loader's iterator draws a seed for its workers when it is made
            if loader.generator is None:
                loader.generator = torch.Generator().manual_seed(derived_seed(*self._parts, self.epoch, self.cycle, "base"))
            iterator = iter(loader)
        if loader.num_workers:
            yield from iterator
            return
        while True:
            if pure:
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            else:
                with isolated_rng():
                    seed_all(self.batch_seed(batch_idx))
                    try:
                        batch = next(iterator)
                    except StopIteration:
                        return
            batch_idx += 1
            yield batch

    def draw(self) -> tuple[Any, Any]:
        """The next batch, and the dataset's own state after it (None where it has none)."""
        batch = next(self._iterator)
        dataset: Any = self.loader.dataset
        state = None
        if self.iterable and not self.loader.num_workers and hasattr(dataset, "state_dict"):
            state = copy.deepcopy(dataset.state_dict())
        return batch, state

    def delivered(self, dataset_state: Any) -> None:
        self.seen += 1
        self._dataset_state = dataset_state

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"epoch": self.epoch, "cycle": self.cycle, "batches_seen": self.seen, "generators": self._epoch_generators}
        if self._dataset_state is not None:
            state["dataset"] = self._dataset_state
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pending_state = state

    def length(self) -> int | float:
        return _length(self.loader)

    def close(self) -> None:
        self._iterator = None


class PlainSource:
    """An iterable that is no torch DataLoader. Its position is its own ``state_dict``, or a count of batches."""

    def __init__(self, iterable: Iterable[Any]) -> None:
        self.iterable_object: Any = iterable
        self.seen = 0
        self.epoch = self.cycle = 0
        self._state: Any = None
        self._pending_state: dict[str, Any] | None = None
        self._iterator: Iterator[Any] = iter(())
        self._stateful = hasattr(iterable, "state_dict") and hasattr(iterable, "load_state_dict")

    def begin(self, epoch: int, cycle: int = 0) -> None:
        loaded, self._pending_state = self._pending_state, None
        self.epoch, self.cycle, self.seen = epoch, cycle, 0
        if loaded is not None:
            self.seen, self.cycle = loaded["batches_seen"], loaded.get("cycle", 0)
        restored = loaded is not None and loaded.get("state") is not None
        if restored:
            assert loaded is not None
            self.iterable_object.load_state_dict(copy.deepcopy(loaded["state"]))
        with isolated_rng():
            self._iterator = iter(self.iterable_object)
        if self.seen and not restored:
            warnings.warn(
                f"{type(self.iterable_object).__name__} has no `state_dict`: the {self.seen} batches already seen are read again to "
                "get back to the position. Use a torch DataLoader, or give it `state_dict` and `load_state_dict`.",
                UserWarning,
                stacklevel=2,
            )
            for _ in range(self.seen):
                next(self._iterator)

    def draw(self) -> tuple[Any, Any]:
        batch = next(self._iterator)
        return batch, copy.deepcopy(self.iterable_object.state_dict()) if self._stateful else None

    def delivered(self, state: Any) -> None:
        self.seen += 1
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return {"batches_seen": self.seen, "cycle": self.cycle, "state": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pending_state = state

    def length(self) -> int | float:
        return _length(self.iterable_object)

    def close(self) -> None:
        self._iterator = iter(())


class BatchStream:
    """What a loop iterates: ``(batch, batch_idx, dataloader_idx)``.

    Args:
        loaders: one loader, or a nested list or dict of them; a `CombinedLoader` brings its own mode.
        mode: ``"max_size_cycle"``: a batch is a collection of one batch of each loader, shorter ones start again;
            ``"min_size"``, ``"max_size"``: the same, ending with the shortest or with None for those that have ended;
            ``"sequential"``: one loader after the other.
        limits: batches of each loader and epoch at most (int), or the fraction of them (float), or None.
        seed: of this run's data; equal seeds give equal batches.

    Nothing in here draws from the process's own random generators: those are the model's.
    """

    def __init__(
        self, loaders: Any, *, mode: str, limits: int | float | None, seed: int, rank: int = 0, name: str = "train_dataloader"
    ) -> None:
        if isinstance(loaders, CombinedLoader):
            loaders, mode = loaders.iterables, loaders.mode
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: use one of {', '.join(MODES)}.")
        flat, self._tree = tree_flatten(loaders)
        for item in flat:
            if not hasattr(item, "__iter__"):
                raise MisconfigurationException(f"{name} returned {item!r}, which cannot be iterated. Return a DataLoader.")
        self.mode = mode
        self._name = name
        self._sources: list[Any] = [
            TrackedLoader(item, seed=seed, rank=rank, number=i) if isinstance(item, DataLoader) else PlainSource(item)
            for i, item in enumerate(flat)
        ]
        lengths = [source.length() for source in self._sources]
        self._limits = [_limited(length, limits, name) for length in lengths]
        self._look_ahead = any(math.isinf(length) for length in lengths)
        self.num_batches: Any = self._limits if mode == "sequential" else _combined(self._limits, mode)
        self.is_last = False
        self.batches_seen = 0
        self._epoch = 0
        self._turn = 0
        self._done: list[bool] = []
        self._ahead: Any = None
        self._pending_state: dict[str, Any] | None = None

    def begin(self, epoch: int) -> None:
        """Start an epoch; once after `load_state_dict`, go on at the position that was saved."""
        loaded, self._pending_state = self._pending_state, None
        self._epoch, self.batches_seen, self._turn, self.is_last, self._ahead = epoch, 0, 0, False, None
        self._done = [False] * len(self._sources)
        if loaded is not None:
            self.batches_seen = loaded["batches_seen"]
            self._done = list(loaded.get("done", self._done))
            states = loaded.get("loaders") or [{"batches_seen": self.batches_seen}] * len(self._sources)
            for source, state in zip(self._sources, states, strict=True):
                source.load_state_dict(state)
        for source in self._sources:
            source.begin(epoch)

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> tuple[Any, int, int]:
        drawn = self._ahead if self._ahead is not None else self._draw(self.batches_seen)
        self._ahead = None
        batch, states, batch_idx, loader_idx = drawn
        for source, state in states:
            source.delivered(state)
        self.batches_seen += 1
        self.is_last = self._known_last(batch_idx)
        if not self.is_last and self._look_ahead:
            try:
                self._ahead = self._draw(self.batches_seen)
            except StopIteration:
                self.is_last = True
        return batch, batch_idx, loader_idx

    def _known_last(self, batch_idx: int) -> bool:
        if self.mode != "sequential":
            return bool(self.batches_seen >= self.num_batches)
        return batch_idx + 1 >= self._limits[self._turn] and not any(self._limits[self._turn + 1 :])

    def _draw(self, count: int) -> tuple[Any, list[Any], int, int]:
        if self.mode == "sequential":
            return self._draw_in_turn()
        if count >= self.num_batches:
            raise StopIteration
        batches, states = [], []
        for number, source in enumerate(self._sources):
            batch, state = self._draw_from(number, source)
            batches.append(batch)
            if not self._done[number] or self.mode == "max_size_cycle":
                states.append((source, state))
        if all(self._done):
            raise StopIteration
        return tree_unflatten(batches, self._tree), states, count, 0

    def _draw_from(self, number: int, source: Any) -> tuple[Any, Any]:
        try:
            if self.mode == "max_size" and self._done[number]:
                return None, None
            return source.draw()  # type: ignore[no-any-return]
        except StopIteration:
            self._done[number] = True
            if self.mode == "max_size":
                return None, None
            if self.mode != "max_size_cycle" or all(self._done):
                raise
            source.begin(self._epoch, source.cycle + 1)
            return source.draw()  # type: ignore[no-any-return]

    def _draw_in_turn(self) -> tuple[Any, list[Any], int, int]:
        while self._turn < len(self._sources):
            source = self._sources[self._turn]
            if source.seen < self._limits[self._turn]:
                try:
                    batch, state = source.draw()
                    return batch, [(source, state)], source.seen, self._turn
                except StopIteration:
                    pass
            self._turn += 1
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out. Plain values and tensors."""
        return {
            "batches_seen": self.batches_seen,
            "done": list(self._done),
            "loaders": [source.state_dict() for source in self._sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at `state` with the next `begin`."""
        self._pending_state = state

    def close(self) -> None:
        """Shut loader workers down."""
        for source in self._sources:
            source.close()


def _length(iterable: Any) -> int | float:
    if isinstance(iterable, DataLoader) and isinstance(iterable.dataset, IterableDataset):
        try:
            return len(iterable)
        except TypeError:
            return math.inf
    try:
        return len(iterable)
    except (TypeError, NotImplementedError):
        return math.inf


def _limited(length: int | float, limit: int | float | None, name: str) -> int | float:
    if limit is None:
        return length
    if isinstance(limit, int):
        return min(length, limit)
    if math.isinf(length):
        raise MisconfigurationException(
            f"A limit of {limit} (a fraction) for {name}, whose length is unknown: give a number of batches (int)."
        )
    if limit > 0 and int(length * limit) == 0:
        raise MisconfigurationException(
            f"A limit of {limit} for {name} of {length} batches leaves none: use at least {1 / length:.3g}, or an int."
        )
    return int(length * limit)


def _combined(limits: list[int | float], mode: str) -> int | float:
    if not limits:
        return 0
    return min(limits) if mode == "min_size" else max(limits)


def _draws_only_at_first(sampler: Any) -> bool:
    inner = sampler.sampler if type(sampler) is BatchSampler else sampler
    return type(inner) in (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler) or (
        type(inner).__name__ == "_InfiniteConstantSampler"
    )


def _generators_of(loader: DataLoader[Any]) -> list[Any]:
    """Random generators that the user gave to the loader or its samplers, in a fixed order, each once."""
    found: list[Any] = [loader.generator] if loader.generator is not None else []
    for part in (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)):
        for value in vars(part).values() if hasattr(part, "__dict__") else ():
            if isinstance(value, (torch.Generator, random.Random, np.random.Generator)) and not any(value is f for f in found):
                found.append(value)
    return found


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        version, words, gauss = generator.getstate()
        return {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss}
    return copy.deepcopy(generator.bit_generator.state)


def _set_generator(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate((state["version"], tuple(state["words"].tolist()), state["gauss"]))
    else:
        generator.bit_generator.state = state
