"""`MilepostStager`: what ``torch.distributed.checkpoint.async_save`` copies the state with."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor

from milepost.engine.plan_memory import PlanMemory
from milepost.engine.requests import BlobPlan, Leaf
from milepost.engine.staging import Arena, StagedImage
from milepost.engine.state import TORCH_TYPES, Flattened
from milepost.format.codec import TensorRef


class MilepostStager(AsyncStager):
    """Copies a state to host memory that is kept and used again, by several threads.

    ::

        stager = MilepostStager()
        future = dcp.async_save(state, storage_writer=MilepostWriter(path), async_stager=stager)

    When `async_save` returns, the state may change. A save that has not ended keeps its memory; the next one gets other
    memory then, so wait for one before the next is begun, as with any stager. Tied tensors stay tied.

    Args:
        threads: that copy.
    """

    _synchronize_after_execute = False

    def __init__(self, *, threads: int = 2) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="milepost-stage")
        self._plans = PlanMemory()
        self._free: list[Arena] = []

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of the state: sharded tensors with the same layout, each rank's part in host memory."""
        numbers, flattened, plans = self._planned(state_dict)
        staged = self._copied(plans)
        places = flattened.tree(lambda number: (0, number))

        def swapped(tensor: torch.Tensor) -> torch.Tensor:
            ref = places[str(numbers[id(tensor)])]
            assert isinstance(ref, TensorRef)
            return _like(tensor, staged[ref.row])

        made: dict[str, Any] = _with_tensors(state_dict, swapped)
        return made

    def prepare(self, state_dict: dict[str, Any]) -> int:
        """Have the memory before the first save, which else takes longer. Returns its bytes."""
        _, _, plans = self._planned(state_dict)
        arena = self._free.pop() if self._free else Arena()
        arena.reserve(plans)
        arena.touch()
        self._free.append(arena)
        return arena.size

    def synchronize_staging(self) -> None:
        """Nothing to wait for: `stage` returns when all is copied."""

    def close(self) -> None:
        """Give back threads and memory, but what a save under way still holds."""
        self._pool.shutdown(wait=True)
        self._free.clear()

    def _planned(self, state_dict: dict[str, Any]) -> tuple[dict[int, int], Flattened, list[BlobPlan]]:
        """The number of each tensor by its identity, and how all of them are to lie in memory."""
        found: list[torch.Tensor] = []
        _each_tensor(state_dict, found.append)
        numbers: dict[int, int] = {}
        for tensor in found:
            numbers.setdefault(id(tensor), len(numbers))
        by_number = {numbers[id(tensor)]: tensor for tensor in found}
        flattened = Flattened({str(number): _local(tensor) for number, tensor in by_number.items()})
        return numbers, flattened, self._plans.plans(flattened)

    def _copied(self, plans: list[BlobPlan]) -> dict[int, torch.Tensor]:
        """The tensors by leaf, in memory of ours, which is free again when none of them is left."""
        if not plans:
            return {}
        arena = self._free.pop() if self._free else Arena()
        (plan,) = plans  # tensors at the top of a state are one group
        (image,), _ = arena.stage(plans, self._pool, self._threads)
        assert isinstance(image, StagedImage)
        memory = np.frombuffer(image.view(0, image.size, memoryview(b"")), np.uint8)
        weakref.finalize(memory, self._free.append, arena).atexit = False
        return {
            leaf.number: _tensor_at(memory, entry.start, leaf)
            for entry, leaf in zip(plan.layout.entries, plan.leaves, strict=True)
        }


def _tensor_at(memory: Any, start: int, leaf: Leaf) -> torch.Tensor:
    name, shape = leaf.stored_as or (None, leaf.shape)
    dtype = TORCH_TYPES[leaf.dtype] if name is None else getattr(torch, name.removeprefix("torch."))
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start).reshape(shape)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _like(tensor: torch.Tensor, staged: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return staged
    # not from_local: that goes through autograd, half a millisecond for each tensor
    return DTensor(staged, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def _each_tensor(value: Any, visit: Callable[[torch.Tensor], Any]) -> None:
    if isinstance(value, torch.Tensor):
        visit(value)
    elif isinstance(value, dict):
        for item in value.values():
            _each_tensor(item, visit)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _each_tensor(item, visit)


def _with_tensors(value: Any, swapped: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of a state with other tensors in it; of all else that can change, a deep copy."""
    if isinstance(value, torch.Tensor):
        return swapped(value)
    if isinstance(value, dict):
        made = copy.copy(value)  # of its own type
        for key, item in value.items():
            made[key] = _with_tensors(item, swapped)
        return made
    if type(value) in (list, tuple):
        return type(value)(_with_tensors(item, swapped) for item in value)
    return copy.deepcopy(value)
