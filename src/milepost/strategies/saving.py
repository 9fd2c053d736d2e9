"""One checkpoint of many ranks, for a CheckpointIO that knows of them and for one that does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from milepost import _distributed
from milepost._distributed import PerRank
from milepost.errors import CheckpointSaveError
from milepost.plugins.io import checkpoint_io as io_calls
from milepost.plugins.io.checkpoint_io import Completed
from milepost.strategies.sharding import whole_on_rank_zero, with_tensors

if TYPE_CHECKING:
    from milepost.plugins.io.checkpoint_io import Pending


def save(
    io: Any,
    checkpoint: dict[str, Any],
    path: str,
    storage_options: Any,
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> Pending:
    """Save through `io`, called on every rank.

    Rank 0's outcome is told to the others before they go on: a save that fails fails everywhere, and training that
    goes on after that goes on everywhere. Where the plugin writes in the background, that is when it has its copy.
    """
    if _distributed.world_size() == 1 or io_calls.takes_every_rank(io):
        return io_calls.save(io, checkpoint, path, storage_options, optimizers)
    whole = whole_on_rank_zero(gathered(checkpoint), _distributed.rank())
    pending: Pending = Completed(path)
    error: Exception | None = None
    if _distributed.rank() == 0:
        try:
            pending = io_calls.save(io, whole, path, storage_options, optimizers)
        except Exception as raised:
            error = raised
    told = _distributed.broadcast_object(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if told is not None:
        raise CheckpointSaveError(f"The checkpoint {path!r} was not saved on rank 0: {told}", path=path,
                                  step=checkpoint.get("global_step"))  # fmt: skip
    return pending


def save_alone(io: Any, checkpoint: dict[str, Any], path: str) -> Pending:
    """Save through `io` on rank 0 what it has, without waiting for anybody. The parts of other ranks are None."""
    if _distributed.world_size() == 1:
        return io_calls.save(io, checkpoint, path)
    if io_calls.takes_every_rank(io):
        raise CheckpointSaveError(
            f"{type(io).__name__} saves with all ranks together, which is impossible once an error has ended the run on"
            " one of them. Go on from the newest checkpoint.",
            path=path,
            step=checkpoint.get("global_step"),
        )
    if _distributed.rank() != 0:
        return Completed(path)
    with_tensors(checkpoint, lambda tensor: _refuse_parts(path))
    others = [None] * (_distributed.world_size() - 1)
    return io_calls.save(io, _replaced(checkpoint, lambda own: [own, *others]), path)


def _refuse_parts(path: str) -> None:
    raise CheckpointSaveError(
        "The model is spread over ranks, which cannot meet once an error has ended the run on one of them. Go on from"
        " the newest checkpoint.",
        path=path,
    )


def own_part(io: Any, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """`checkpoint` as `io` would get it, with this rank's values alone."""
    if io_calls.takes_every_rank(io):
        return checkpoint
    local = with_tensors(checkpoint, lambda tensor: tensor.to_local())
    opened: dict[str, Any] = _replaced(local, lambda own: [own])
    return opened


def gathered(checkpoint: dict[str, Any]) -> Any:
    """On rank 0 `checkpoint` with the values of all ranks; elsewhere without any."""
    mine: list[Any] = []
    _replaced(checkpoint, mine.append)
    of_ranks = _distributed.gather_objects(mine)
    if of_ranks is None:
        return _replaced(checkpoint, lambda own: None)  # what is spread over ranks takes all of them
    columns = iter([list(column) for column in zip(*of_ranks, strict=True)])
    return _replaced(checkpoint, lambda own: next(columns))


def _replaced(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of the dicts on the way to `PerRank` values, with ``change(value)`` in the place of each."""
    if isinstance(value, PerRank):
        return change(value.value)
    if type(value) is dict and any(isinstance(item, (dict, PerRank)) for item in value.values()):
        return {key: _replaced(item, change) for key, item in value.items()}
    return value
