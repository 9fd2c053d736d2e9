"""One loader each, driven so that its position is known and can be gone back to."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, IterDataPipe, TensorDataset, default_collate

from milepost import _distributed
from milepost.data.division import Division
from milepost.data.indices import (
    SeededIndex,
    numbers_of,
    order_state,
    own_generator,
    replayed,
    restore_order,
    sampler_parts,
)
from milepost.data.rng import derived_seed, seeded
from milepost.data.workers import (
    EpochIndex,
    SkippedTurn,
    Unterminated,
    WorkerBatch,
    WorkerCollate,
    WorkerDataset,
    WorkerInit,
    is_stateful,
)

_WATCHED_BATCHES = 3  # a dataset that counts does so from the first sample on


class _Indices:
    """Replaces a loader's batch sampler: the user's indices, from a position on, tagged with a seed for each batch."""

    def __init__(self, source: TrackedLoader) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source.sampler)

    def __iter__(self) -> Iterator[Any]:
        source = self._source
        for batch_idx, index in enumerate(source.replay, source.start):
            yield source.tagged(index, batch_idx)


class TrackedLoader:
    """One torch DataLoader. Its randomness depends on seed, epoch and batch alone.

    The user's loader is left alone: a shallow copy of the same class gets our indices in the place of its sampler.
    """

    stateful = False  # it has no state of its own: what is saved is ours

    def __init__(
        self, loader: DataLoader[Any], *, seed: int, rank: int, number: int, division: Division | None = None
    ) -> None:
        self.loader = loader
        self._parts = (seed, rank, number)
        self._native = self.division = division
        self.iterable = isinstance(loader.dataset, IterableDataset)
        self._in_workers = self.iterable and loader.num_workers > 0 and not isinstance(loader.dataset, IterDataPipe)
        self.batched = loader.batch_sampler is not None
        self.sampler: Any = loader.batch_sampler if self.batched else loader.sampler
        self.epoch = self.cycle = 0
        self.limit: int | float = math.inf  # batches of an epoch at most: no index beyond is drawn, nor loaded ahead
        self.start = 0  # index lists passed over
        self.replay: Iterator[Any] = iter(())
        self.seen = 0
        self._pending_state: dict[str, Any] | None = None
        self._order: dict[str, Any] = {}
        self._dataset_state: Any = None
        self._ended = self._fetch_ended = False
        self._numbers: dict[str, Any] = {}  # of a dataset in this process, where the epoch began
        self._changing: str | None = None
        self._worker_states: dict[str, Any] = {}
        self._next_worker = 0
        self._iterator: Any = iter(())
        self._copy: DataLoader[Any] | None = None
        self._wrapper: WorkerDataset | None = None

    def seed_of(self, part: int | str) -> int:
        """Seed of a batch, or of what a name stands for, in this epoch."""
        return derived_seed(*self._parts, self.epoch, self.cycle, part)

    def tagged(self, index: Any, batch_idx: int) -> Any:
        """`index` as it goes to a worker, or unchanged where there is none."""
        if not self.loader.num_workers:
            return index
        return (
            EpochIndex(index, self.seed_of("epoch"))
            if self._in_workers
            else SeededIndex(index, self.seed_of(batch_idx))
        )

    def prepare(self) -> None:
        """Called before `begin`, so that `length` is that of the epoch to come."""
        self.division = self._division_from(self._pending_state)

    def begin(self, epoch: int, cycle: int = 0) -> None:
        """Start `epoch` (for the `cycle`-th time in it), or go on where the loaded state stands."""
        loaded, self._pending_state = self._pending_state, None
        if loaded is not None:
            self.close()  # its workers stand elsewhere
        self.division = self._division_from(loaded)
        self.epoch = epoch if loaded is None else loaded.get("epoch", epoch)
        self.cycle = cycle if loaded is None else loaded.get("cycle", 0)
        self._worker_states, self._next_worker, self._ended = {}, 0, False
        self._dataset_state = self._live_dataset_state()
        self._numbers = {} if self.iterable or self.loader.num_workers else numbers_of(self.loader.dataset)
        self.seen = 0 if loaded is None else loaded["batches_seen"]
        for part in (*sampler_parts(self.loader), self.loader.dataset):
            set_epoch = getattr(part, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(self.epoch)
        if loaded is not None and loaded.get("order"):
            restore_order(self.loader, loaded["order"])
        self._order = order_state(self.loader)
        self.start = 0 if self.iterable else self.seen - (self.division.before if self.division else 0)
        self._replay_order()
        begun = loaded is not None and (self.seen or loaded.get("dataset") is not None)
        skip = self._restore_dataset(loaded) if loaded is not None and begun else 0
        self._iterator = self._batches(self.seen - skip)
        for _ in range(skip):
            next(self._iterator)

    def _replay_order(self) -> None:
        # at once, not at the first batch: the generators that the user gave must move on even if none is left
        stop = None if self.iterable or math.isinf(self.limit) else int(self.limit)
        if self.division is None:
            indices = replayed(self.sampler, self.seed_of("sampler"))
        else:
            indices = self._divided_order(self.division)
            stop = None if stop is None else max(stop - self.division.before, 0)
        self.replay = itertools.islice(indices, stop)
        for _ in range(self.start):
            next(self.replay, None)

    def _divided_order(self, division: Division) -> Iterator[Any]:
        seed, _, number = self._parts
        # of rank 0: the loader's own sampler is to say the same on every rank
        shared_seed = derived_seed(seed, 0, number, self.epoch, self.cycle, "sampler")
        own = replayed(division.sampler(self.loader), shared_seed)
        order = division.order(self.loader, self.epoch, own)
        return division.batches(self.loader, division.share(order))

    def _division_from(self, loaded: dict[str, Any] | None) -> Division | None:
        """The division of this epoch: that of a checkpoint goes on, and be it on a single rank."""
        state = None if loaded is None else loaded.get("division")
        if state is None or self.iterable:
            return self._native
        return (self._native or Division(0, 1)).going_on(state)

    def _restore_dataset(self, loaded: dict[str, Any]) -> int:
        """Bring the dataset to its saved state. Returns how many batches must be read again for want of one."""
        dataset: Any = self.loader.dataset
        if not self.iterable:
            if loaded.get("dataset") is not None and is_stateful(dataset):
                dataset.load_state_dict(copy.deepcopy(loaded["dataset"]))
                self._dataset_state = loaded["dataset"]
            elif (reason := self._inexact(loaded)) is not None:
                _warn(reason)
            return 0
        if loaded.get("dataset") is not None and not self.loader.num_workers:
            dataset.load_state_dict(copy.deepcopy(loaded["dataset"]))
            self._dataset_state, self._ended = loaded["dataset"], loaded.get("ended", False)
            return 0
        same_workers = self._in_workers and loaded.get("num_workers") == self.loader.num_workers
        if same_workers and is_stateful(dataset) and loaded.get("workers"):
            self._worker_states, self._next_worker = dict(loaded["workers"]), loaded["next_worker"]
            return 0
        _warn(
            f"The position of {_name_of(dataset)} was not saved with these {self.loader.num_workers} workers: the "
            f"{self.seen} batches already seen are read again to get back to it. Give the dataset `state_dict` and "
            "`load_state_dict`, and keep num_workers."
        )
        return self.seen

    def _inexact(self, loaded: dict[str, Any]) -> str | None:
        """Why a map dataset cannot go on as it was, and the remedy; None where it can."""
        dataset, kind = self.loader.dataset, type(self.loader.dataset).__name__
        if is_stateful(dataset):
            return (
                f"{kind} has a `state_dict`, but its copies in the {self.loader.num_workers} workers have states of"
                " their own, which are not saved: they begin again. Use num_workers=0, or let a sample depend on its"
                " index and on the global generators alone."
            )
        if (name := own_generator(dataset)) is not None:
            return (
                f"{kind}.{name} is a random generator of its own, whose state is not saved: what it draws from here on"
                " differs from the unbroken run. Draw from torch's, NumPy's or Python's global generator, which is"
                " seeded for each batch, or give the dataset `state_dict` and `load_state_dict` (with num_workers=0)."
            )
        if (name := loaded.get("changing")) is not None:
            return (
                f"{kind}.{name} changes as samples are read, and is not saved: samples that depend on it differ from"
                " the unbroken run. Give the dataset `state_dict` and `load_state_dict` (with num_workers=0)."
            )
        return None

    def _loader_copy(self) -> DataLoader[Any]:
        if self._copy is not None and self.loader.persistent_workers:
            return self._copy
        loader = copy.copy(self.loader)
        fields = loader.__dict__  # DataLoader refuses plain assignment of these
        fields["_iterator"] = None
        init = loader.worker_init_fn
        if _distributed.world_size() > 1 and loader.num_workers:
            init = fields["worker_init_fn"] = Unterminated(init)
        if not self.iterable or (self._in_workers):
            fields["batch_sampler" if self.batched else "sampler"] = _Indices(self)
        if self._in_workers:
            size = (self.loader.batch_size or 1) if self.batched else 1
            self._wrapper = WorkerDataset(self.loader.dataset, size)
            fields["dataset"] = self._wrapper
            fields["collate_fn"] = WorkerCollate(self.loader.collate_fn, self._wrapper)
            fields["worker_init_fn"] = WorkerInit(init)
        fields["generator"] = torch.Generator()  # seeds the workers; the user's moves with the sampler alone
        self._copy = loader
        return loader

    def _open(self) -> Iterator[Any]:
        loader = self._loader_copy()
        if self._wrapper is not None:
            self._wrapper.states = {int(worker): state for worker, state in self._worker_states.items()}
            self._wrapper.skips = self._next_worker
        with seeded(self.seed_of("iterator")):
            loader.generator.manual_seed(self.seed_of("base"))
            return iter(loader)

    def _batches(self, batch_idx: int) -> Iterator[Any]:
        if self._ended:  # the last, shorter batch was the last one delivered
            return
        iterator = self._open()
        fetcher = getattr(iterator, "_dataset_fetcher", None)
        plain = type(self.loader).__iter__ is DataLoader.__iter__
        pure = type(self.loader.dataset) is TensorDataset and self.loader.collate_fn is default_collate
        while True:
            try:
                if plain and (pure or self.loader.num_workers):  # nothing is drawn in this process
                    batch = next(iterator)
                else:
                    with seeded(self.seed_of(batch_idx)):
                        batch = next(iterator)
            except StopIteration:
                return
            if isinstance(batch, SkippedTurn):
                continue
            batch_idx += 1
            self._fetch_ended = bool(getattr(fetcher, "ended", False))
            yield batch

    def draw(self) -> tuple[Any, Any]:
        """The next batch, and the state of the dataset (or of the worker that made the batch) after it, or None."""
        batch = next(self._iterator)
        if isinstance(batch, WorkerBatch):
            return batch.batch, (batch.worker, batch.state)
        state = self._live_dataset_state()
        return batch, None if state is None else (state, self._fetch_ended)

    def delivered(self, state: Any) -> None:
        """The batch that `draw` returned with `state` has been handed out."""
        self.seen += 1
        if self._numbers and self.seen < _WATCHED_BATCHES:
            now = numbers_of(self.loader.dataset)
            self._changing = next((name for name, number in self._numbers.items() if now.get(name) != number), None)
        if self._in_workers:
            worker, self._worker_states[str(state[0])] = state
            self._next_worker = (worker + 1) % self.loader.num_workers
        elif state is not None:
            self._dataset_state, self._ended = state

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch delivered. Plain values and tensors, and what the dataset calls its state."""
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "cycle": self.cycle,
            "batches_seen": self.seen,
            "order": self._order,
        }
        if not self.iterable:
            state["batch_size"] = self.loader.batch_size if self.batched else 1
        if self.division is not None:
            state["division"] = self.division.state_dict(self.loader.batch_size if self.batched else 1)
        if self._changing is not None:
            state["changing"] = self._changing
        if self._dataset_state is not None:
            state["dataset"], state["ended"] = self._dataset_state, self._ended
        if self._in_workers and is_stateful(self.loader.dataset):
            state["workers"] = dict(self._worker_states)
            state["next_worker"], state["num_workers"] = self._next_worker, self.loader.num_workers
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at `state` with the next `begin`."""
        self._pending_state = state

    def resting_state(self) -> dict[str, Any] | None:
        """What lives through epochs, as it is now: generators, samplers with a state, a dataset in this process."""
        order, dataset = order_state(self.loader), self._live_dataset_state()
        if dataset is None and not any(order.values()):
            return None
        return {"order": order, "dataset": dataset}

    def load_resting_state(self, state: dict[str, Any]) -> None:
        """Put back what `resting_state` returned."""
        restore_order(self.loader, state["order"])
        dataset: Any = self.loader.dataset
        if state["dataset"] is not None and is_stateful(dataset) and not self.loader.num_workers:
            dataset.load_state_dict(copy.deepcopy(state["dataset"]))

    def _live_dataset_state(self) -> Any:
        dataset: Any = self.loader.dataset
        if self.loader.num_workers or not is_stateful(dataset):
            return None
        return copy.deepcopy(dataset.state_dict())

    def length(self) -> int | float:
        """Batches in an epoch, inf where unknown."""
        return length_of(self.loader) if self.division is None else self.division.batch_count(self.loader)

    def close(self) -> None:
        """Let the workers go."""
        self._iterator, self._copy, self._wrapper = iter(()), None, None


class PlainSource:
    """An iterable that is no torch DataLoader. Its position is its own ``state_dict``, or a count of batches."""

    def __init__(
        self, iterable: Iterable[Any], *, seed: int, rank: int, number: int, division: Division | None = None
    ) -> None:
        self.iterable_object: Any = iterable
        self._parts = (seed, rank, number)
        self.seen = 0
        self.epoch = self.cycle = 0
        self._state: Any = None
        self._pending_state: dict[str, Any] | None = None
        self._iterator: Iterator[Any] = iter(())
        self.stateful = is_stateful(iterable)
        self.limit: int | float = math.inf
        self._drawn = 0

    def prepare(self) -> None:
        """Its length is what it says at any time."""

    def _seeded(self, part: int | str) -> Any:
        return seeded(derived_seed(*self._parts, self.epoch, self.cycle, part))

    def begin(self, epoch: int, cycle: int = 0) -> None:
        """Start `epoch` (for the `cycle`-th time in it), or go on where the loaded state stands."""
        loaded, self._pending_state = self._pending_state, None
        self.epoch, self.cycle, self.seen, self._state = epoch, cycle, 0, None
        skip = 0
        if loaded is not None:
            self.epoch, self.cycle, self.seen = (
                loaded.get("epoch", epoch),
                loaded.get("cycle", 0),
                loaded["batches_seen"],
            )
            skip = self.seen
            if loaded.get("state") is not None:
                self.iterable_object.load_state_dict(copy.deepcopy(loaded["state"]))
                self._state, skip = loaded["state"], 0
        if callable(getattr(self.iterable_object, "set_epoch", None)):
            self.iterable_object.set_epoch(self.epoch)
        with self._seeded("iterator"):
            self._iterator = iter(self.iterable_object)
        if skip:
            _warn(
                f"{type(self.iterable_object).__name__} has no `state_dict`: the {self.seen} batches already seen are "
                "read again to get back to the position. Use a torch DataLoader, or give it `state_dict` and "
                "`load_state_dict`."
            )
        for batch_idx in range(skip):
            with self._seeded(batch_idx):
                next(self._iterator)
        self._drawn = self.seen

    def draw(self) -> tuple[Any, Any]:
        """The next batch, and the iterable's state after it, or None."""
        with self._seeded(self._drawn):
            batch = next(self._iterator)
        self._drawn += 1
        return batch, copy.deepcopy(self.iterable_object.state_dict()) if self.stateful else None

    def delivered(self, state: Any) -> None:
        """The batch that `draw` returned with `state` has been handed out."""
        self.seen += 1
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch delivered."""
        return {"epoch": self.epoch, "cycle": self.cycle, "batches_seen": self.seen, "state": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at `state` with the next `begin`."""
        self._pending_state = state

    def resting_state(self) -> Any:
        """The iterable's own state now, or None."""
        return copy.deepcopy(self.iterable_object.state_dict()) if self.stateful else None

    def load_resting_state(self, state: Any) -> None:
        """Put back what `resting_state` returned."""
        if self.stateful:
            self.iterable_object.load_state_dict(copy.deepcopy(state))

    def length(self) -> int | float:
        """Batches in an epoch, inf where unknown."""
        return length_of(self.iterable_object)

    def close(self) -> None:
        """Forget the iterator."""
        self._iterator = iter(())


def _name_of(dataset: Any) -> str:
    return type(getattr(dataset, "_datapipe", dataset)).__name__  # a data pipe comes wrapped


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)


def length_of(iterable: Any) -> int | float:
    if isinstance(iterable, DataLoader) and isinstance(iterable.dataset, IterableDataset):
        try:
            return len(iterable)
        except TypeError:
            return math.inf
    try:
        return len(iterable)
    except (TypeError, NotImplementedError):
        return math.inf
