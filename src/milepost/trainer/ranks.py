"""What of a run's state is a rank's own, and how it goes into a checkpoint and comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from milepost import _distributed
from milepost._distributed import OfAllRanks, PerRank
from milepost.callbacks.checkpoint import Checkpoint
from milepost.errors import ResumeError
from milepost.loggers.local import LocalLogger
from milepost.trainer.standing import callback_keys

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer

_OWN = ("rng", "data", "metrics", "metric_objects", "gradients", "loaders")
"""Keys of ``checkpoint["milepost"]`` that each rank has for itself: where there are several, under ``ranks``."""


def split_ranks(exact: dict[str, Any], ranks: int) -> dict[str, Any]:
    """`exact` as several ranks save it: what is this rank's own marked as such, under the key ``ranks``."""
    if ranks == 1:
        return exact
    own = {key: exact[key] for key in _OWN if key in exact}
    return {**{key: value for key, value in exact.items() if key not in _OWN}, "ranks": PerRank(own)}


def join_ranks(checkpoint: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """`checkpoint` with the part of `rank`, one of `ranks`, in its place.

    Raises:
        ResumeError: it was saved by another number of ranks.
    """
    exact = checkpoint.get("milepost")
    if not exact or ("ranks" not in exact and ranks == 1):
        return checkpoint
    shared = {key: value for key, value in exact.items() if key not in ("ranks", *_OWN)}
    saved = exact.get("ranks", [{key: exact[key] for key in _OWN if key in exact}])
    if isinstance(saved, OfAllRanks):
        saved = list(saved.values)
    if isinstance(saved, Mapping):
        return {**checkpoint, "milepost": {**shared, **saved}}
    if len(saved) != ranks:
        raise ResumeError(f"The checkpoint was saved by {len(saved)} ranks, and these are {ranks}.")
    return {**checkpoint, "milepost": {**shared, **saved[rank]}}


def checkpointer_states(trainer: Trainer) -> dict[str, Any]:
    """On many ranks the states of the checkpointers as rank 0 has them: it alone deletes and ranks files."""
    if trainer.world_size == 1 or trainer.state.status == "interrupted":
        return {}
    states = {
        key: callback.state_dict() for key, callback in callback_keys(trainer) if isinstance(callback, Checkpoint)
    }
    return {key: state for key, state in _distributed.broadcast_object(states).items() if state}


def agree_on_versions(trainer: Trainer) -> None:
    """All ranks name the directory that rank 0's loggers have chosen, before one of them makes it."""
    for logger in trainer.loggers:
        if isinstance(logger, LocalLogger):
            logger.agree()
