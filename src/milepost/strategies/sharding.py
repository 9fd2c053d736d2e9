"""Tensors of which each rank holds a part: whole ones made of them, and parts of whole ones."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_spread(value: Any) -> TypeGuard[DTensor]:
    """Whether `value` is a DTensor. Nothing is before somebody has imported them, which takes a while."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(value, tensors.DTensor)


def shard_like(live: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value`, a whole tensor, as `live` is spread over the ranks; no rank is asked, and only its part is copied.

    `value` itself where `live` is no DTensor, or where it is one already, or of another shape.
    """
    if not is_spread(live) or is_spread(value) or value.shape != live.shape:
        return value
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(live.shape, live.device_mesh, live.placements)
    part = value[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    local = torch.empty(shape, dtype=value.dtype, device=live.to_local().device)
    local.copy_(part)
    return DTensor.from_local(
        local, live.device_mesh, live.placements, run_check=False, shape=live.shape, stride=live.stride()
    )


def with_tensors(value: Any, change: Callable[[DTensor], Any]) -> Any:
    """A copy of the containers around DTensors, with ``change(tensor)`` in the place of each; all else as it is."""
    if is_spread(value):
        return change(value)
    if isinstance(value, dict):
        items = {key: with_tensors(item, change) for key, item in value.items()}
        if all(items[key] is item for key, item in value.items()):
            return value
        if type(value) is not OrderedDict:
            return items
        ordered = OrderedDict(items)
        if (versions := getattr(value, "_metadata", None)) is not None:
            ordered._metadata = versions  # type: ignore[attr-defined]
        return ordered
    if type(value) in (list, tuple):
        made = type(value)(with_tensors(item, change) for item in value)
        return value if all(a is b for a, b in zip(made, value, strict=True)) else made
    return value


def whole_on_rank_zero(value: Any, rank: int) -> Any:
    """`value` with every DTensor whole in the host memory of rank 0, and None in its place elsewhere.

    Called on every rank. They are gathered one after the other: beside what rank 0 keeps, one at a time is whole.
    """

    def gathered(tensor: DTensor) -> torch.Tensor | None:
        with torch.no_grad():
            whole = tensor.full_tensor()
        if rank != 0:
            return None
        host: torch.Tensor = whole.cpu()
        return host.clone() if host.data_ptr() == tensor.to_local().data_ptr() else host

    return with_tensors(value, gathered)
