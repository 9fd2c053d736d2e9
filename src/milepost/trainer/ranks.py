"""What of a run's state is a rank's own, and how it goes into a checkpoint and comes out of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from milepost import _distributed
from milepost._distributed import OfAllRanks, PerRank
from milepost.data.division import resharded
from milepost.data.rng import PrivateRng, RngState, derived_seed
from milepost.loggers.local import LocalLogger
from milepost.strategies.sharding import is_spread

if TYPE_CHECKING:
    from milepost.strategies.strategy import Strategy
    from milepost.trainer.trainer import Trainer

_OWN = ("rng", "data", "metrics", "metric_objects", "gradients", "loaders")
"""Keys of ``checkpoint["milepost"]`` that each rank has for itself: where there are several, under ``ranks``."""


def split_ranks(exact: dict[str, Any], strategy: Strategy) -> dict[str, Any]:
    """`exact` as several ranks save it: what is this rank's own marked as such, under the key ``ranks``."""
    if strategy.world_size == 1:
        return exact
    gradients = exact.get("gradients", {}).values()
    keys = [key for key in _OWN if key != "gradients" or not any(is_spread(g) for g in gradients)]
    own = {key: exact[key] for key in keys if key in exact}
    shared = {key: value for key, value in exact.items() if key not in own}
    return {**shared, "data_ranks": strategy.data_ranks, "ranks": PerRank(own)}


def join_ranks(checkpoint: dict[str, Any], strategy: Strategy) -> dict[str, Any]:
    """`checkpoint` with this rank's part in its place.

    Where another number of ranks has saved it, that part is made from theirs.

    Raises:
        ResumeError: it was written inside an epoch, and how the samples were divided then is not known.
    """
    exact, rank, ranks = checkpoint.get("milepost"), _distributed.rank(), strategy.world_size
    if not exact or ("ranks" not in exact and ranks == 1):
        return checkpoint
    saved = exact.get("ranks", [{key: exact[key] for key in _OWN if key in exact}])
    apart = ("ranks", "data_ranks", *(() if "ranks" in exact else _OWN))
    shared = {key: value for key, value in exact.items() if key not in apart}
    readers = exact.get("data_ranks", 1)  # into how many parts the data was divided
    if isinstance(saved, OfAllRanks):
        saved = list(saved.values)
    if isinstance(saved, Mapping):
        own = dict(saved)
    elif len(saved) == ranks and saved[rank]:
        own = dict(saved[rank])
    else:
        own = _made_from(saved, rank, ranks, shared)
    if readers != strategy.data_ranks and "data" in own:
        own["data"] = resharded(own["data"], readers)
    return {**checkpoint, "milepost": {**shared, **own}}


def _made_from(saved: list[Any], rank: int, ranks: int, shared: dict[str, Any]) -> dict[str, Any]:
    """A part for `rank` of `ranks`, from the parts that others have saved. One that was lost with its rank is None."""
    present = [part for part in saved if part]
    if len(present) < len(saved):
        warnings.warn(
            "The checkpoint was written when an error had ended the run on some rank: the random state of the other"
            " ranks is not in it, and begins anew.",
            stacklevel=2,
        )
    own = saved[rank] if rank < len(saved) and saved[rank] else None
    made = dict(own or present[0])
    if own is None:
        made["rng"], made["metric_objects"] = _fresh_rng(shared["data_seed"], rank), {}
    elif len(saved) > ranks and any(part.get("metric_objects") for part in present):
        warnings.warn("What metric objects had accumulated on ranks that are no more is left out.", stacklevel=2)
    if any("gradients" in part for part in present):
        made["gradients"] = _mean([part.get("gradients", {}) for part in present])
    made["metrics"] = _merged_metrics([part["metrics"] for part in present], rank)
    return made


def _fresh_rng(seed: int, rank: int) -> dict[str, Any]:
    with PrivateRng(derived_seed(seed, "rank", rank)):
        return RngState.capture().state_dict()


def _mean(gradients: list[dict[str, Any]]) -> dict[str, Any]:
    """What each rank is to have so that their mean, which a step takes, holds what all the saved ones had added up."""
    names = dict.fromkeys(name for part in gradients for name in part)
    return {name: sum(part[name] for part in gradients if name in part) / len(gradients) for name in names}


def _merged_metrics(states: list[dict[str, Any]], rank: int) -> dict[str, Any]:
    """The running reductions of all. One that ranks reduce together goes on on rank 0, with nothing on the others."""
    merged = dict(states[0])
    merged["epoch"] = [
        _merged_entry(list(entries), rank) for entries in zip(*(s["epoch"] for s in states), strict=False)
    ]
    return merged


def _merged_entry(entries: list[dict[str, Any]], rank: int) -> dict[str, Any]:
    entry = dict(entries[0])
    totals = [e["total"] for e in entries if e["total"] is not None]
    if not totals:
        return entry
    if entry["reduction"] in ("min", "max"):
        entry["total"] = getattr(torch.stack(totals), entry["reduction"])()
        return entry
    entry["total"], entry["weight"] = sum(totals), sum(e["weight"] for e in entries)
    if entry.get("sync") and rank:
        entry["total"], entry["weight"] = torch.zeros_like(entry["total"]), 0
    return entry


def rank_zeros(trainer: Trainer, states: dict[str, Any]) -> dict[str, Any]:
    """The callbacks' `states` as rank 0 has them, where a plugin is called on every rank: what is saved once is of one.

    Checkpointers on the other ranks know less: rank 0 ranks and deletes files. States with large tensors, such as
    averaged weights, are taken to be the same on all ranks, and are not sent.
    """
    if not trainer.strategy.saves_on_every_rank or trainer.state.status == "interrupted":
        return states
    small = {key: state for key, state in states.items() if _tensor_bytes(state) <= _SENT_BYTES}
    told: tuple[list[str], dict[str, Any]] = _distributed.broadcast_object((list(states), small))
    return {key: told[1][key] if key in told[1] else states[key] for key in told[0]}


_SENT_BYTES = 2**20


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def agree_on_versions(trainer: Trainer) -> None:
    """All ranks name the directory that rank 0's loggers have chosen, before one of them makes it."""
    for logger in trainer.loggers:
        if isinstance(logger, LocalLogger):
            logger.agree()
