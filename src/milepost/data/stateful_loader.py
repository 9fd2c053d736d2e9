"""Loaders that keep their own position, such as torchdata's StatefulDataLoader, made exact."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from milepost.data.division import Division
from milepost.data.indices import SeededIndex, draws_at_once, order_state, restore_order, sampler_parts
from milepost.data.rng import PrivateRng, derived_seed, seeded
from milepost.data.sources import length_of
from milepost.data.workers import is_stateful


class StatefulLoader:
    """One DataLoader with ``state_dict`` and ``load_state_dict``; its position is what it says itself.

    Such loaders restore where they are in the data, not what their workers draw. So each index still goes to its
    worker with a seed, and what the sampler draws does not depend on the process's random state. The loader itself is
    iterated: what its ``state_dict`` returns is what it would return without Milepost.
    """

    stateful = True

    def __init__(
        self, loader: DataLoader[Any], *, seed: int, rank: int, number: int, division: Division | None = None
    ) -> None:
        self.loader: Any = loader if division is None else _with_torchs_sampler(loader, division)
        self._parts = (seed, rank, number)
        self.epoch = self.cycle = self.seen = 0
        self.limit: int | float = math.inf
        self.own_state: Any = None
        self.order: dict[str, Any] = {}
        self._pending_state: dict[str, Any] | None = None
        self._iterator: Iterator[Any] = iter(())
        self._drawn = 0
        self._sampler: Any = None

    def seed_of(self, part: int | str) -> int:
        """Seed of a batch, or of what a name stands for, in this epoch."""
        return derived_seed(*self._parts, self.epoch, self.cycle, part)

    def prepare(self) -> None:
        """Its length is what it says at any time."""

    def begin(self, epoch: int, cycle: int = 0) -> None:
        """Start `epoch` (for the `cycle`-th time in it), or go on where the loaded state stands."""
        loaded, self._pending_state = self._pending_state, None
        self.epoch, self.cycle, self.seen, self.own_state = epoch, cycle, 0, None
        if loaded is not None:
            self.epoch, self.cycle = loaded.get("epoch", epoch), loaded.get("cycle", 0)
            self.seen, self.own_state = loaded["batches_seen"], loaded.get("state")
        for part in (*sampler_parts(self.loader), self.loader.dataset, self.loader):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(self.epoch)
        if loaded is not None and loaded.get("order"):
            restore_order(self.loader, loaded["order"])
        self.order = order_state(self.loader)
        if self.own_state is not None:
            self.loader.load_state_dict(copy.deepcopy(self.own_state))
        self._drawn = self.seen
        self._sampler = self._tagging(_indices_drawn(self.own_state, self.seen))
        with seeded(self.seed_of("iterator")), self._in_place():
            self._iterator = iter(self.loader)

    def _tagging(self, drawn: int) -> Any:
        inner = self.loader.batch_sampler if self.loader.batch_sampler is not None else self.loader.sampler
        build = _StatefulTagging if is_stateful(inner) else _Tagging
        return build(self, inner, drawn)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The loader's sampler is ours: where an iterator is made, and where it is asked for a batch."""
        fields = self.loader.__dict__  # DataLoader refuses plain assignment
        name = "sampler" if self.loader.batch_sampler is None else "batch_sampler"
        users, fields[name] = fields[name], self._sampler
        try:
            yield
        finally:
            fields[name] = users

    def draw(self) -> tuple[Any, Any]:
        """The next batch, and the loader's state after it."""
        with seeded(self.seed_of(self._drawn)), self._in_place():
            batch = next(self._iterator)
        self._drawn += 1
        return batch, copy.deepcopy(self.loader.state_dict())

    def delivered(self, state: Any) -> None:
        """The batch that `draw` returned with `state` has been handed out."""
        self.seen += 1
        self.own_state = state

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch delivered."""
        return {
            "epoch": self.epoch, "cycle": self.cycle, "batches_seen": self.seen, "order": self.order,
            "state": self.own_state,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at `state` with the next `begin`."""
        self._pending_state = state

    def resting_state(self) -> dict[str, Any] | None:
        """What lives through epochs, as it is now: generators, samplers with a state, a dataset in this process."""
        dataset = self.loader.dataset
        here = not self.loader.num_workers and is_stateful(dataset)
        return {"order": order_state(self.loader), "dataset": copy.deepcopy(dataset.state_dict()) if here else None}

    def load_resting_state(self, state: dict[str, Any]) -> None:
        """Put back what `resting_state` returned."""
        restore_order(self.loader, state["order"])
        if state["dataset"] is not None and is_stateful(self.loader.dataset) and not self.loader.num_workers:
            self.loader.dataset.load_state_dict(copy.deepcopy(state["dataset"]))

    def length(self) -> int | float:
        """Batches in an epoch, inf where unknown."""
        return length_of(self.loader)

    def close(self) -> None:
        """Let the workers go."""
        self._iterator = iter(())
        if hasattr(self.loader, "_iterator"):
            self.loader._iterator = None


def _with_torchs_sampler(loader: DataLoader[Any], division: Division) -> DataLoader[Any]:
    """A copy of `loader`, which keeps its position itself, that reads one rank's samples through torch's sampler."""
    sampler: Any = DistributedSampler(
        loader.dataset, division.ranks, division.rank, bool(division.shuffle), division.seed, division.uneven == "drop"
    )
    batching = loader.batch_sampler
    fields = (divided := copy.copy(loader)).__dict__  # DataLoader refuses plain assignment
    fields["sampler"] = sampler
    if batching is not None:
        fields["batch_sampler"] = BatchSampler(sampler, loader.batch_size or 1, loader.drop_last)
    return divided


class _Tagging:
    """The user's sampler under random state of its own; indices on their way to a worker carry the batch's seed."""

    def __init__(self, source: StatefulLoader, inner: Any, drawn: int) -> None:
        self.source, self.inner, self.drawn = source, inner, drawn

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        # torchdata asks twice where it starts workers and once where they persist: the order is to be the same
        restore_order(self.source.loader, self.source.order)
        rng = PrivateRng(self.source.seed_of("sampler"))
        with rng:
            iterator = iter(self.inner)
        build = _StatefulTaggedIterator if is_stateful(iterator) else _TaggedIterator
        return build(self, iterator, rng)


class _StatefulTagging(_Tagging):
    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)


class _TaggedIterator:
    def __init__(self, tagging: _Tagging, iterator: Iterator[Any], rng: PrivateRng) -> None:
        self._tagging, self._inner, self._rng = tagging, iterator, rng
        self._number = 0
        self._private = True

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._private:
            with self._rng:
                index = next(self._inner)
            self._private = not draws_at_once(self._tagging.inner)
        else:
            index = next(self._inner)
        number, self._number = self._number, self._number + 1
        source = self._tagging.source
        return SeededIndex(index, source.seed_of(number)) if source.loader.num_workers else index


class _StatefulTaggedIterator(_TaggedIterator):
    def state_dict(self) -> Any:
        return self._inner.state_dict()  # type: ignore[attr-defined]

    def load_state_dict(self, state: Any) -> None:
        with self._rng:
            self._inner.load_state_dict(state)  # type: ignore[attr-defined]
        self._number = self._tagging.drawn


def _indices_drawn(state: Any, seen: int) -> int:
    """How many index lists had been drawn where torchdata's `state` of a loader with workers was taken."""
    main = state.get("_snapshot", {}).get("_main_snapshot", {}) if isinstance(state, dict) else {}
    return int(main.get("_sampler_iter_yielded", seen))
