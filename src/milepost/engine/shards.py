"""What of a tensor this rank holds, and in which memory: all of a plain one, the local boxes of a DTensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from milepost.engine.spread import is_dtensor, local_tensor
from milepost.errors import ResumeError
from milepost.format.boxes import Box
from milepost.format.regions import Span, chunk, grid, strided_chunk


class Held(NamedTuple):
    """A box of a tensor, and the memory that it is in, which has the box's shape, any strides, and any device."""

    box: Box
    memory: torch.Tensor


def held(tensor: torch.Tensor) -> list[Held]:
    """The parts that this rank holds. Empty where it holds nothing, as the last ranks of an uneven sharding do.

    Raises:
        ResumeError: a DTensor's local tensor is not what its placements say, or it is a sum that was not yet made.
    """
    if not is_dtensor(tensor):
        return [Held(Box((0,) * tensor.dim(), tuple(tensor.shape)), tensor)]
    sharded: Any = tensor
    coordinate = sharded.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    local = local_tensor(sharded).detach()
    spans = local_spans(tuple(sharded.shape), tuple(sharded.device_mesh.shape), sharded.placements, coordinate)
    sizes = tuple(sum(stop - start for start, stop in each) for each in spans)
    if sizes != tuple(local.shape):
        raise ResumeError(
            f"A DTensor of shape {list(sharded.shape)} placed as {list(sharded.placements)} holds a local tensor of"
            f" shape {list(local.shape)}, {list(sizes)} was expected: shard it as torch.chunk does."
        )
    return [Held(Box(offsets, shape), box_of(local, inner, shape)) for offsets, shape, inner in grid(spans)]


def box_of(tensor: torch.Tensor, offsets: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """A view of a box of a tensor."""
    for dimension, (start, size) in enumerate(zip(offsets, shape, strict=True)):
        tensor = tensor.narrow(dimension, start, size)
    return tensor


def local_spans(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Any], coordinate: Sequence[int]
) -> list[list[Span]]:
    """For each dimension of a DTensor, the global indices that the rank at `coordinate` of its mesh holds.

    Raises:
        ResumeError: a placement is `Partial`: the tensor's values are not known before a reduction.
    """
    spans: list[list[Span]] = [[(0, size)] if size else [] for size in shape]
    for axis in _order(mesh_shape, placements):
        count, placement, number = mesh_shape[axis], placements[axis], coordinate[axis]
        before = spans[placement.dim]
        factor = getattr(placement, "split_factor", None)
        if factor is None or _cut_last(axis, mesh_shape, placements):
            spans[placement.dim] = chunk(before, count, number)
        else:
            spans[placement.dim] = strided_chunk(before, int(factor), count, number)
    return spans


def _order(mesh_shape: Sequence[int], placements: Sequence[Any]) -> list[int]:
    """The mesh's dimensions that cut the tensor, in the order in which they did.

    FSDP cuts what tensor parallelism has cut already, and stands before it in the mesh: such a placement says over how
    many parts it strides. To read it from left to right is the same only where all parts are equally large.
    """
    cutting = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    for axis in cutting:
        if placements[axis].is_partial() or not hasattr(placements[axis], "dim"):
            raise ResumeError(
                f"A DTensor is placed as {placements[axis]}, a sum that was not yet made: redistribute it to"
                " Replicate() or Shard() first."
            )
    last = [axis for axis in cutting if _cut_last(axis, mesh_shape, placements)]
    return [axis for axis in cutting if axis not in last] + last[::-1]


def _cut_last(axis: int, mesh_shape: Sequence[int], placements: Sequence[Any]) -> bool:
    """Whether this dimension of the mesh cut what all later ones had cut before."""
    placement = placements[axis]
    later = [n for n in range(axis + 1, len(placements)) if getattr(placements[n], "dim", None) == placement.dim]
    return getattr(placement, "split_factor", None) == math.prod(mesh_shape[n] for n in later) and bool(later)


def new_beside(pattern: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of another type, laid out over the ranks as the DTensor `pattern` is; its values are to be filled in."""
    from torch.distributed.tensor import DTensor

    assert isinstance(pattern, DTensor)
    local = torch.empty_like(local_tensor(pattern).detach(), dtype=dtype)
    return DTensor.from_local(
        local, pattern.device_mesh, pattern.placements, run_check=False, shape=pattern.shape, stride=pattern.stride()
    )
