"""The order of the data: a user's sampler, replayed from the state in which its epoch began."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from milepost.data.rng import PrivateRng, seed_all
from milepost.errors import ResumeError

_DRAW_AT_ONCE = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)


_TORCHDATA = "torchdata.stateful_dataloader.sampler"


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


def replayed(sampler: Any, seed: int) -> Iterator[Any]:
    """What `sampler` yields when it runs under random state of its own that starts from `seed`."""
    rng = PrivateRng(seed)
    with rng:
        iterator = iter(sampler)
    while True:
        try:
            with rng:
                index = next(iterator)
        except StopIteration:
            return
        yield index
        if draws_at_once(sampler):  # torch's own: no need to swap random state for every batch
            yield from iterator
            return


def draws_at_once(sampler: Any) -> bool:
    """Whether `sampler` is known to draw nothing from the process's generators after its first index."""
    batching = type(sampler) is BatchSampler or type(sampler).__module__ == _TORCHDATA
    inner = getattr(sampler, "sampler", sampler) if batching else sampler
    return (
        type(inner).__module__ == _TORCHDATA
        or type(inner) in _DRAW_AT_ONCE
        or type(inner).__name__ == "_InfiniteConstantSampler"
    )


def sampler_parts(loader: DataLoader[Any]) -> list[Any]:
    """The loader's sampler, batch sampler and what that one wraps, each once."""
    parts: list[Any] = []
    for part in (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)):
        if part is not None and not any(part is known for known in parts):
            parts.append(part)
    return parts


def order_state(loader: DataLoader[Any]) -> dict[str, Any]:
    """State of all that decides the order: explicit generators, and samplers with a ``state_dict``."""
    stateful = [part for part in sampler_parts(loader) if _is_stateful(part)]
    return {
        "generators": [_generator_state(generator) for generator in _generators_of(loader)],
        "samplers": [part.state_dict() for part in stateful],
    }


def restore_order(loader: DataLoader[Any], state: dict[str, Any]) -> None:
    """Put back what `order_state` returned.

    Raises:
        ResumeError: the loader has other generators, or other samplers with a state.
    """
    found = len(_generators_of(loader)), sum(map(_is_stateful, sampler_parts(loader)))
    saved_counts = len(state["generators"]), len(state["samplers"])
    if found != saved_counts:
        raise ResumeError(
            f"The checkpoint's loader had {saved_counts[0]} generators and {saved_counts[1]} samplers with a state,"
            f" this one has {found[0]} and {found[1]}. Build the loader as it was to go on inside its epoch."
        )
    for generator, saved in zip(_generators_of(loader), state["generators"], strict=True):
        _set_generator(generator, saved)
    stateful = [part for part in sampler_parts(loader) if _is_stateful(part)]
    for part, saved in zip(stateful, state["samplers"], strict=True):
        part.load_state_dict(saved)


def own_generator(dataset: Any) -> str | None:
    """Name of the first attribute of `dataset` that is a random generator, which nobody saves."""
    for name, value in vars(dataset).items() if hasattr(dataset, "__dict__") else ():
        if _is_generator(value):
            return str(name)
    return None


def numbers_of(dataset: Any) -> dict[str, Any]:
    """Attributes of `dataset` that are plain numbers: one that changes while samples are read is a counter."""
    fields = vars(dataset) if hasattr(dataset, "__dict__") else {}
    return {name: value for name, value in fields.items() if type(value) in (int, float)}


def _is_stateful(part: Any) -> bool:
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")


def _is_generator(value: Any) -> bool:
    return isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState))


def _generators_of(loader: DataLoader[Any]) -> list[Any]:
    found: list[Any] = [] if loader.generator is None else [loader.generator]
    for part in sampler_parts(loader):
        for value in vars(part).values() if hasattr(part, "__dict__") else ():
            if _is_generator(value) and not any(value is known for known in found):
                found.append(value)
    return found


def _generator_state(generator: Any) -> Any:
    """Plain values or a tensor. NumPy's holds integers of 128 bits and arrays, hence the text."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        version, words, gauss = generator.getstate()
        return {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss}
    state = generator.get_state(legacy=False) if isinstance(generator, np.random.RandomState) else None
    return json.dumps(generator.bit_generator.state if state is None else state, default=_plain)


def _plain(value: Any) -> Any:
    return {"array": value.tolist(), "dtype": str(value.dtype)} if isinstance(value, np.ndarray) else value.item()


def _arrays(value: dict[str, Any]) -> Any:
    return np.array(value["array"], dtype=value["dtype"]) if set(value) == {"array", "dtype"} else value


def _set_generator(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate((state["version"], tuple(state["words"].tolist()), state["gauss"]))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(json.loads(state, object_hook=_arrays))
    else:
        generator.bit_generator.state = json.loads(state, object_hook=_arrays)
