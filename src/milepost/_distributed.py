"""One facade over torch.distributed. Without a process group: rank 0 of 1, collectives are the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

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


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if is_initialized() else 1


def barrier() -> None:
    if is_initialized():
        dist.barrier()


def broadcast_object(value: T, source: int = 0) -> T:
    """Return rank `source`'s value on every rank."""
    if not is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def all_gather_objects(value: T) -> list[T]:
    """Every rank's value, in order, on every rank."""
    if not is_initialized():
        return [value]
    found: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


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
