"""The batches of an epoch, at a position that can be saved and gone back to without loading anything again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader

from milepost.data.division import Division
from milepost.data.sources import PlainSource, TrackedLoader, length_of
from milepost.data.stateful_loader import StatefulLoader
from milepost.data.workers import is_stateful
from milepost.errors import MisconfigurationException, ResumeError

MODES = ("max_size_cycle", "min_size", "max_size", "sequential")


class BatchStream:
    """What a loop iterates: ``(batch, batch_idx, dataloader_idx)``.

    Args:
        loaders: one loader, or a nested list or dict of them; a `CombinedLoader` brings its own mode.
        mode: ``"max_size_cycle"``: a batch is a collection of one batch of each loader, shorter ones start again;
            ``"min_size"``, ``"max_size"``: the same, ending with the shortest or with None for those that have ended;
            ``"sequential"``: one loader after the other.
        limits: batches of each loader and epoch at most (int), or the fraction of them (float), or None.
        seed: of this run's data; equal seeds give equal batches.
        rank: the randomness of a batch depends on it too.
        divide: how each loader's samples are divided among ranks; None where it is read as it is.

    Nothing in here draws from the process's own random generators: those are the model's.
    """

    def __init__(
        self,
        loaders: Any,
        *,
        mode: str,
        limits: int | float | None,
        seed: int,
        rank: int = 0,
        divide: Callable[[Any], Division | None] = lambda item: None,
        name: str = "train_dataloader",
    ) -> None:
        if isinstance(loaders, CombinedLoader):
            loaders, mode = loaders.iterables, loaders.mode
        self.loaders = loaders
        if mode not in MODES:
            raise MisconfigurationException(f"mode={mode!r}: use one of {', '.join(MODES)}.")
        flat, self._tree = tree_flatten(loaders)
        for item in flat:
            if not hasattr(item, "__iter__"):
                raise MisconfigurationException(
                    f"{name} returned {item!r}, which cannot be iterated. Return a DataLoader."
                )
        self.mode = mode
        self._name = name
        self._sources: list[Any] = [
            _source_class(item)(item, seed=seed, rank=rank, number=i, division=divide(item))
            for i, item in enumerate(flat)
        ]
        self._limit = limits
        self._measure()
        self.is_last = False
        self.batches_seen = 0
        self._epoch = 0
        self._turn = 0
        self._done: list[bool] = []
        self._ahead: Any = None
        self._position: dict[str, Any] | None = None
        self._pending_state: dict[str, Any] | None = None

    def _measure(self) -> None:
        """Find the number of batches. It may be another in an epoch that goes on among other ranks."""
        lengths = [source.length() for source in self._sources]
        self._limits = [_limited(length, self._limit, self._name) for length in lengths]
        self._look_ahead = any(math.isinf(length) for length in lengths)
        self.num_batches: Any = self._limits if self.mode == "sequential" else _combined(self._limits, self.mode)
        for source, most in zip(self._sources, self._limits, strict=True):
            # read together, a loader with fewer batches than the others starts again after all of its own
            source.limit = most if self.mode == "sequential" else self.num_batches

    def begin(self, epoch: int) -> None:
        """Start an epoch; once after `load_state_dict`, go on at the position that was saved."""
        loaded, self._pending_state = self._pending_state, None
        self._epoch, self.batches_seen, self._turn, self.is_last, self._ahead = epoch, 0, 0, False, None
        self._position = None
        self._done = [False] * len(self._sources)
        if loaded is not None:
            self.batches_seen = loaded["batches_seen"]
            self.is_last = bool(loaded.get("is_last", False))
            if self.is_last and "resting" in loaded:  # nothing is left to be read
                self.load_resting_state(loaded["resting"])
                self._position = {key: value for key, value in loaded.items() if key not in ("is_last", "resting")}
                return
            self._done = list(loaded.get("done", self._done))
            states = loaded.get("loaders") or self._states_of_others(loaded.get("own_states"))
            self._refuse_others(states)
            for source, state in zip(self._sources, states, strict=True):
                source.load_state_dict(state)
        for source in self._sources:
            source.prepare()
        self._measure()
        for source in self._sources:
            source.begin(epoch)

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> tuple[Any, int, int]:
        if self.is_last:
            raise StopIteration
        drawn = self._ahead if self._ahead is not None else self._draw(self.batches_seen)
        self._ahead = None
        batch, states, batch_idx, loader_idx = drawn
        for source, state in states:
            source.delivered(state)
        self.batches_seen += 1
        self.is_last = self._known_last(batch_idx)
        self._position = None
        if not self.is_last and self._look_ahead:
            self._position = self._snapshot()  # before the look ahead moves on
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
        state = dict(self._snapshot() if self._position is None else self._position)
        state["is_last"] = self.is_last
        if self.is_last:
            state["resting"] = self.resting_state()
        return state

    def _snapshot(self) -> dict[str, Any]:
        return {
            "batches_seen": self.batches_seen,
            "done": list(self._done),
            "loaders": [source.state_dict() for source in self._sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at `state` with the next `begin`."""
        self._pending_state = state

    def resting_state(self) -> list[Any]:
        """State of each loader between two epochs: of generators, samplers and datasets that live through them."""
        return [source.resting_state() for source in self._sources]

    def load_resting_state(self, states: list[Any]) -> None:
        """Put back what `resting_state` returned, before the next `begin`.

        A new epoch may well be read from other loaders: that is a warning, and they begin as they are.
        """
        try:
            self._refuse_others(states)
            for source, state in zip(self._sources, states, strict=True):
                if state is not None:
                    source.load_resting_state(state)
        except ResumeError as error:
            warnings.warn(
                f"{self._name} gives other loaders than before, which begin as they are. {error}", stacklevel=2
            )

    def own_states(self, state: dict[str, Any]) -> list[Any]:
        """What loaders with a state of their own said of the position `state`, as Lightning keeps it."""
        own = [
            part.get("state") for part, source in zip(state["loaders"], self._sources, strict=True) if source.stateful
        ]
        return [] if any(part is None for part in own) else own

    def _states_of_others(self, own_states: list[Any] | None) -> list[Any]:
        """Positions in a file of Lightning: a count of batches, and what stateful loaders say."""
        states: list[dict[str, Any]] = [{"batches_seen": self.batches_seen} for _ in self._sources]
        stateful = [state for state, source in zip(states, self._sources, strict=True) if source.stateful]
        if own_states:
            if len(own_states) != len(stateful):
                raise ResumeError(
                    f"The checkpoint holds the states of {len(own_states)} loaders that have one, but {self._name}"
                    f" returned {len(stateful)} such loaders. Return the same loaders."
                )
            for state, own in zip(stateful, own_states, strict=True):
                state["state"] = own
        return states

    def _refuse_others(self, states: list[Any]) -> None:
        if len(states) != len(self._sources):
            raise ResumeError(
                f"The checkpoint holds the positions of {len(states)} loaders, but {self._name} returned"
                f" {len(self._sources)}. Return the same loaders, or load the weights with load_from_checkpoint and"
                " start a new fit."
            )

    def close(self) -> None:
        """Shut loader workers down."""
        for source in self._sources:
            source.close()


class CombinedLoader:
    """Several loaders read together; a Trainer takes it wherever it takes a loader.

    Args:
        iterables: one loader, or a nested list or dict of them.
        mode: see `BatchStream`. `fit` takes all but ``"sequential"``, `predict` only that one.

    By itself it yields ``(batch, batch_idx, dataloader_idx)``.

    Raises:
        MisconfigurationException: an unknown mode.
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in MODES:
            raise MisconfigurationException(f"CombinedLoader(mode={mode!r}): use one of {', '.join(MODES)}.")
        self.iterables = iterables
        self.mode = mode

    @property
    def flattened(self) -> list[Any]:
        """The loaders, in the order in which they are read."""
        return tree_flatten(self.iterables)[0]

    def __iter__(self) -> BatchStream:
        # as a DataLoader takes its own seed: another order each time, the same under the same global seed
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        stream = BatchStream(self, mode=self.mode, limits=None, seed=seed)
        stream.begin(0)
        return stream

    def __len__(self) -> int:
        """Batches in all. Raises TypeError where a loader does not know its length."""
        lengths = [length_of(loader) for loader in self.flattened]
        batches = sum(lengths) if self.mode == "sequential" else _combined(lengths, self.mode)
        if math.isinf(batches):
            raise TypeError("A loader of this CombinedLoader does not know its length.")
        return int(batches)


def _source_class(item: Any) -> Any:
    if not isinstance(item, DataLoader):
        return PlainSource
    return StatefulLoader if is_stateful(item) else TrackedLoader


def _limited(length: int | float, limit: int | float | None, name: str) -> int | float:
    if limit is None or length == 0:
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
