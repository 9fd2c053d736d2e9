"""One facade over torch.distributed. Without a process group: rank 0 of 1, collectives are the identity."""

from __future__ import annotations

import atexit
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")


@dataclass(frozen=True)
class PerRank(Generic[T]):
    """Marks a value, in a state that several ranks save together, that each rank has for itself.

    All else is assumed equal on all ranks, DTensors apart, and saved once.
    """

    value: T


@dataclass(frozen=True)
class OfAllRanks(Generic[T]):
    """What a `PerRank` value is loaded as where the number of ranks has changed: that of every rank which saved it.

    At the same number of ranks each gets its own back, bare.
    """

    values: tuple[T, ...]


# ---- the process group -----------------------------------------------------------------------------------------------


def is_launched() -> bool:
    """Whether a launcher, such as torchrun, has told this process its place among others."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def announced_rank() -> int:
    """The rank, also before there is a process group: the one that the launcher has told."""
    return int(os.environ["RANK"]) if is_launched() and not is_initialized() else rank()


def start(backend: str, timeout: timedelta | None = None) -> None:
    """Join the process group that the launcher has announced, or make one of a single rank. Left when Python exits.

    A group that is there already is taken as it is, and stays its maker's to destroy.
    """
    global _joined
    _joined = True
    if is_initialized():
        return
    options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    if is_launched():
        store, place, ranks = next(rendezvous("env://", **options))
        store = PrefixStore(generation(), store)
    else:
        store, place, ranks = HashStore(), 0, 1
    dist.init_process_group(backend, store=store, rank=place, world_size=ranks, **options)
    atexit.register(stop)


_joined = False


def is_among_others() -> bool:
    """Whether a launcher has started several ranks that are to meet, or have met and have not parted yet."""
    several = is_launched() and int(os.environ["WORLD_SIZE"]) > 1
    return several and (is_initialized() or not _joined)


def generation() -> str:
    """Tells the ranks that are started now from those before a restart.

    torchrun keeps one store for all of them (torch 2.13), in which new ranks would find where the dead ones listened.
    On several machines the counts of restarts may differ: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is the remedy.
    """
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return f"milepost/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if alone else 0}"


def store() -> Any:
    """The rendezvous store of the process group, on a connection of its own."""
    shared: Any = dist.distributed_c10d._get_default_store()
    return shared.clone()


def give_up(over: bool = True) -> None:
    """An error ends what this rank does with the others: it waits for none of them for long any more.

    Args:
        over: False: a new run begins.
    """
    global _given_up
    _given_up = over


def patience(seconds: float) -> float:
    """How long to wait for another rank that does not get on, which is `seconds` as long as all is well."""
    return min(seconds, _HURRIED_SECONDS) if _given_up else seconds


_given_up = False
_HURRIED_SECONDS = 5.0


def stop() -> None:
    """Leave the process group, if there is one."""
    if is_initialized():
        dist.destroy_process_group()


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if is_initialized() else 1


_saves_alone: ContextVar[bool] = ContextVar("saves_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this rank saves and loads by itself what is its own: a CheckpointIO does not wait for the others."""
    token = _saves_alone.set(True)
    try:
        yield
    finally:
        _saves_alone.reset(token)


def is_alone() -> bool:
    """Whether the caller is inside `alone`."""
    return _saves_alone.get()


# ---- collectives: call them on every rank ---------------------------------------------------------------------------


def barrier() -> None:
    if is_initialized():
        dist.barrier()


def broadcast_object(value: T, source: int = 0) -> T:
    """Return rank `source`'s value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: T) -> list[T] | None:
    """Every rank's `value`, by rank; None on all ranks but 0."""
    if world_size() == 1:
        return [value]
    found: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, found)
    return found


def all_gather_objects(value: T) -> list[T]:
    """Every rank's `value`, by rank."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def on_rank_zero(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, which alone calls it; an error of it is raised on every rank."""
    if world_size() == 1:
        return function()
    value: Any = None
    error: Exception | None = None
    if rank() == 0:
        try:
            value = function()
        except Exception as raised:
            error = raised
    value, told = broadcast_object((value, None if error is None else _sendable(error)))
    if error is not None:
        raise error
    if told is not None:
        raise told
    return value  # type: ignore[no-any-return]


def _sendable(error: Exception) -> Exception:
    """`error` as the other ranks can have it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"on rank 0: {type(error).__name__}: {error}")
    return error


def all_gather(
    tensor: torch.Tensor, group: dist.ProcessGroup | None = None, *, sync_grads: bool = False
) -> torch.Tensor:
    """Every rank's `tensor`, stacked along a new first dimension of size world size; `tensor` itself on a single rank.

    Args:
        tensor: of the same shape and type on every rank.
        sync_grads: let gradients flow back to the rank that each part came from.
    """
    if not is_initialized():
        return tensor
    tensor = tensor.contiguous()
    if sync_grads:
        from torch.distributed.nn.functional import all_gather as differentiable

        return torch.stack(differentiable(tensor, group=group or dist.group.WORLD))  # type: ignore[no-untyped-call]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return torch.stack(parts)


def reduced(tensor: torch.Tensor, operation: str, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The ``"mean"``, ``"sum"``, ``"min"`` or ``"max"`` of every rank's `tensor`; `tensor` itself on a single rank."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    kinds = {"min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
    dist.all_reduce(total, kinds.get(operation, dist.ReduceOp.SUM), group=group)
    return total / dist.get_world_size(group) if operation == "mean" else total
