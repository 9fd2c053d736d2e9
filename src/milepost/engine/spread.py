"""What a DTensor is on this rank: its local tensor, and how the whole one is spread over the ranks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from milepost.engine.rank_plan import Spread
from milepost.errors import UnencodableValueError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Sharded(NamedTuple):
    """One tensor of several ranks, as this one sees it.

    Attributes:
        shape: of the whole.
        stride: of the whole, as DTensor says it: the same on all ranks, as the local part's need not be.
        storage: tells the local memory apart from others', also where it has no elements.
    """

    shape: tuple[int, ...]
    spread: Spread
    stride: tuple[int, ...]
    storage: int


class Spreads:
    """The spreads of meshes and placements, each worked out once: there are few, and thousands of tensors."""

    def __init__(self) -> None:
        self._known: dict[Any, Spread] = {}

    def of(self, tensor: DTensor, path: str) -> Sharded:
        """Raises UnencodableValueError: it cannot be stored as it is placed; `path` says where it stands."""
        mesh, placements = tensor.device_mesh, tuple(tensor.placements)
        key = (id(mesh), placements)
        if key not in self._known:
            self._known[key] = _spread(mesh, placements, path)
        storage = tensor._local_tensor.untyped_storage()._cdata
        return Sharded(tuple(tensor.shape), self._known[key], tuple(tensor.stride()), storage)


def is_dtensor(value: torch.Tensor) -> bool:
    """Whether it is a DTensor. Nothing is imported for that: without the module there is none."""
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_tensor(tensor: DTensor) -> torch.Tensor:
    """This rank's part, in its own memory."""
    local: Any = tensor._local_tensor
    found: torch.Tensor = local.wait() if hasattr(local, "wait") else local  # a collective may still fill it
    return found


def _spread(mesh: Any, placements: tuple[Any, ...], path: str) -> Spread:
    ranks = _with_siblings(mesh)
    cuts = tuple((placements[axis].dim, axis + 1) for axis in _in_order(placements, mesh.shape, path))
    return Spread(tuple(ranks.reshape(-1).tolist()), tuple(ranks.shape), cuts)


def _with_siblings(mesh: Any) -> torch.Tensor:
    """The ranks of a mesh and, along a first dimension, of those cut out of the same larger mesh in the same way.

    Over dimensions of the larger mesh that a tensor knows nothing of it is replicated: with tensor parallelism, what is
    only sharded by FSDP is so once for each rank of the other dimension, and each of these sees a mesh of its own.
    """
    layout, ranks = getattr(mesh, "_layout", None), getattr(mesh, "_rank_map", None)
    if layout is None or ranks is None:  # of an older torch
        return mesh.mesh.unsqueeze(0)  # type: ignore[no-any-return]
    return layout.remap_to_tensor(ranks)  # type: ignore[no-any-return]


def _in_order(placements: tuple[Any, ...], sizes: tuple[int, ...], path: str) -> list[int]:
    """The dimensions of the mesh that cut the tensor, in the order in which they did.

    That is their own order, but for what FSDP lays over tensor parallelism: it cuts after those behind it.
    """
    order: list[int] = []
    for axis in reversed(range(len(placements))):
        placement = placements[axis]
        if placement.is_partial():
            raise UnencodableValueError(
                f"The tensor at {path} is a DTensor of partial sums ({placement}): no rank has its values. Redistribute"
                " it to Replicate() or Shard() first.",
                key_path=path,
            )
        factor = getattr(placement, "split_factor", None)
        if factor is None and not placement.is_shard():
            continue
        behind = [other for other in order if placements[other].dim == placement.dim]
        cut = 1
        for other in behind:
            cut *= sizes[other]
        if factor is None or factor == 1:
            order.insert(0, axis)
        elif factor == cut:
            order.append(axis)
        else:
            raise _unknown(placements, path)
    return order


def _unknown(placements: tuple[Any, ...], path: str) -> UnencodableValueError:
    return UnencodableValueError(
        f"The tensor at {path} is a DTensor placed as {list(placements)}, which leaves a rank more than one box of it."
        " Redistribute it to Shard() and Replicate() first.",
        key_path=path,
    )
