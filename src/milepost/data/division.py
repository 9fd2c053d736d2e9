"""How the samples of an epoch are divided among ranks, and how an epoch goes on among another number of them."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler
from torch.utils.data import SequentialSampler as InOrder

from milepost.errors import MisconfigurationException, ResumeError

Uneven = Literal["pad", "drop", "keep"]


@dataclass(frozen=True)
class Division:
    """Rank `rank` of `ranks` gets every `ranks`-th sample of one order, as torch's DistributedSampler has it.

    Attributes:
        uneven: where the samples do not divide: ``"pad"`` repeats the first ones, ``"drop"`` leaves the last ones out,
            ``"keep"`` gives some ranks one less.
        seed: of torch's DistributedSampler, where the order is shuffled as it does.
        shuffle: whether it is; False: in order; None: the loader's own sampler says, the same on every rank.
        consumed: samples of the order that all ranks together had been given where this division began.
        before: batches of the epoch that each rank had been given there.
    """

    rank: int
    ranks: int
    uneven: Uneven = "pad"
    seed: int = 0
    shuffle: bool | None = None
    consumed: int = 0
    before: int = 0

    def share(self, order: Sequence[Any]) -> list[Any]:
        """This rank's part of what is left of `order`."""
        left = list(order[self.consumed :])
        if self.uneven == "pad" and left:
            short = -len(left) % self.ranks
            left += list(itertools.islice(itertools.cycle(order), short))
        elif self.uneven == "drop":
            left = left[: len(left) // self.ranks * self.ranks]
        return left[self.rank :: self.ranks]

    def share_length(self, samples: int) -> int:
        """Length of this rank's part of an order of `samples`."""
        left = max(samples - self.consumed, 0)
        if self.uneven == "keep":
            return len(range(self.rank, left, self.ranks))
        return math.ceil(left / self.ranks) if self.uneven == "pad" else left // self.ranks

    def sampler(self, loader: DataLoader[Any]) -> Any:
        """The loader's own order of samples."""
        batching: Any = loader.batch_sampler
        return loader.sampler if batching is None else batching.sampler

    def order(self, loader: DataLoader[Any], epoch: int, own: Iterator[Any]) -> list[Any]:
        """All indices of the epoch, the same on every rank. `own` is what the loader's own sampler yields."""
        if self.shuffle is None:
            return list(own)
        whole: DistributedSampler[Any] = DistributedSampler(
            loader.dataset, num_replicas=1, rank=0, shuffle=self.shuffle, seed=self.seed
        )  # fmt: skip
        whole.set_epoch(epoch)
        return list(whole)

    def batches(self, loader: DataLoader[Any], share: list[Any]) -> Iterator[Any]:
        """`share` as the loader's batch sampler puts it together; single indices where it does not batch."""
        batching = loader.batch_sampler
        if batching is None:
            return iter(share)
        if type(batching) is not BatchSampler:
            return iter(_over(batching, share))
        return iter(BatchSampler(share, batching.batch_size, batching.drop_last))

    def batch_count(self, loader: DataLoader[Any]) -> int:
        """Batches that this rank gets in the epoch, those before this division began included."""
        samples = self.share_length(len(loader.dataset if self.shuffle is not None else self.sampler(loader)))  # type: ignore[arg-type]
        batching = loader.batch_sampler
        if batching is None:
            return self.before + samples
        if type(batching) is not BatchSampler:
            return self.before + len(_over(batching, range(samples)))
        size = batching.batch_size
        return self.before + (samples // size if batching.drop_last else math.ceil(samples / size))

    def state_dict(self, batch_size: int | None) -> dict[str, Any]:
        """Plain values, from which `going_on` finds the position among another number of ranks."""
        return {
            "ranks": self.ranks, "consumed": self.consumed, "before": self.before, "batch_size": batch_size,
            "seed": self.seed, "shuffle": self.shuffle,
        }  # fmt: skip

    def going_on(self, state: dict[str, Any]) -> Division:
        """The division of this rank that goes on where `state` stands."""
        names = ("consumed", "before", "seed", "shuffle")
        return replace(self, **{name: state[name] for name in names})


def resharded(position: dict[str, Any], ranks: int) -> dict[str, Any]:
    """The `position` of a stream, as one of `ranks` ranks saved it, for another number of them to go on from.

    What they had been given together is left out of the order, and the rest of it is divided among the new ones.

    Raises:
        ResumeError: a loader whose samples were divided by somebody else, so that nobody knows what was read.
    """
    return {**position, "loaders": [_resharded(state, ranks) for state in position["loaders"]]}


def _resharded(state: dict[str, Any], ranks: int) -> dict[str, Any]:
    seen, division = state["batches_seen"], state.get("division")
    if division is None and ranks == 1 and "state" not in state:  # one rank reads its loader as it is
        size = state.get("batch_size")
        division = {"consumed": 0, "before": 0, "batch_size": size, "seed": 0, "shuffle": None}
    if division is None or division["batch_size"] is None:
        raise ResumeError(
            "The checkpoint was written inside an epoch by another number of ranks, and the samples were divided among"
            " them by the program, or put into batches of no fixed size: which of them were read is not known. Go on"
            " from a checkpoint written at the end of an epoch, or with as many ranks."
        )
    consumed = division["consumed"] + (seen - division["before"]) * division["batch_size"] * ranks
    return {**state, "division": {**division, "consumed": consumed, "before": seen, "ranks": ranks}}


def division_of(item: Any, rank: int, ranks: int, *, seed: int, keep: bool) -> Division | None:
    """How a loader of the user's is divided among ranks; None where it is read as it is.

    Args:
        item: what the user gave as a loader.
        seed: for loaders that shuffle.
        keep: every sample exactly once, though some ranks get one more (for predictions).

    Raises:
        MisconfigurationException: its batch sampler cannot be given a part of the samples.
    """
    if not isinstance(item, DataLoader) or isinstance(item.dataset, IterableDataset):
        return None
    sampler: Any = item.sampler
    batching = item.batch_sampler
    if batching is not None and type(batching) is not BatchSampler:
        sampler = getattr(batching, "sampler", None)
        if sampler is None:
            raise MisconfigurationException(
                f"{type(batching).__name__} has no attribute `sampler`, so its batches cannot be made of one rank's"
                " part of the samples. Give it one, or divide the samples yourself and pass"
                " Trainer(use_distributed_sampler=False)."
            )
    if hasattr(sampler, "num_replicas"):
        if type(sampler) is not DistributedSampler or (sampler.num_replicas, sampler.rank) != (ranks, rank):
            return None  # the user's own division
        return Division(rank, ranks, "drop" if sampler.drop_last else "pad", sampler.seed, sampler.shuffle)
    uneven: Uneven = "keep" if keep else "pad"
    if type(sampler) is InOrder:
        return Division(rank, ranks, uneven, seed, False)
    plain = type(sampler) is RandomSampler and not sampler.replacement and sampler.generator is None
    if plain and sampler._num_samples is None:
        return Division(rank, ranks, uneven, seed, True)
    return Division(rank, ranks, uneven)


def _over(batching: Any, samples: Any) -> Any:
    """A copy of the user's batch sampler that puts `samples` together."""
    copied = copy.copy(batching)
    copied.sampler = samples
    return copied
