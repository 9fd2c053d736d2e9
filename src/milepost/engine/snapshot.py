"""A copy of a nested state, for plugins that take one: tensors are views of an arena, all else is copied beside it."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from milepost.engine.batch import Batch, Staging
from milepost.engine.lazy import can_wait
from milepost.engine.staging import Arena

_ALIGN_BYTES = 64


def snapshot(
    state: Any, arena: Arena, threads: Executor, workers: int, lazy: Mapping[int, int] | None = None
) -> tuple[Any, Staging | None]:
    """A copy of `state` on the host; what shares memory goes on sharing it. Consumes no random numbers.

    Args:
        arena: where the tensors' bytes go. It is not used again while anybody holds one of them.
        lazy: as for `DirectoryEngine.save`.

    Returns:
        The copy, and what is still being copied into it, if anything.
    """
    walk = _Walk(lazy or {})
    made = walk.visit(state)
    memory = arena.lend(walk.size)
    address = ctypes.addressof(memory)
    batch = Batch(arena.device)
    storages = []
    for part in walk.parts:
        data = torch.frombuffer(memory, dtype=torch.uint8, count=part.size, offset=part.offset)
        storages.append(data.untyped_storage())
        whole = part.whole()
        of_device = batch.device.takes(whole)
        if of_device:
            batch.by_device(whole, address + part.offset, part.waits)
        else:
            batch.by_host(part, 0, part.size, address + part.offset, part.waits)
        if part.waits:
            batch.watch(part.name, part.tensor, address + part.offset, of_device)
    for view in walk.views:
        view.place(storages[view.part])
    return made, arena.copy(batch, threads, workers)


@dataclass(frozen=True)
class _Part:
    """A storage of the state, and where its bytes go."""

    name: str
    tensor: torch.Tensor
    storage: torch.UntypedStorage
    size: int
    offset: int
    waits: bool

    def whole(self) -> torch.Tensor:
        """All bytes of the storage, as a tensor."""
        return torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage)

    def copy(self, start: int, stop: int, address: int) -> None:
        if self.storage.device.type == "cpu":
            ctypes.memmove(address, self.storage.data_ptr() + start, stop - start)
            return
        part = self.whole()[start:stop].cpu()
        ctypes.memmove(address, part.data_ptr(), stop - start)


@dataclass(frozen=True)
class _View:
    """A tensor of the copy, made before there is memory for it."""

    made: torch.Tensor
    original: torch.Tensor
    part: int

    @torch.no_grad()
    def place(self, storage: torch.UntypedStorage) -> None:
        original = self.original
        self.made.set_(storage, original.storage_offset(), original.size(), original.stride())
        self.made.requires_grad_(original.requires_grad)


class _Walk:
    """Goes through a state and copies what is no tensor."""

    def __init__(self, lazy: Mapping[int, int]) -> None:
        self.parts: list[_Part] = []
        self.views: list[_View] = []
        self.size = 0
        self._lazy = lazy
        self._path: list[str] = []
        self._numbers: dict[tuple[int, int], int] = {}  # of the parts, by where their storage is
        self._made: dict[int, Any] = {}  # by the identity of the original: what is met twice is copied once

    def visit(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if id(value) in self._made:
            return self._made[id(value)]
        kind = type(value)
        if kind in (dict, OrderedDict, Counter, defaultdict):
            return self._dict(value)
        if kind is list:
            made: Any = self._remember(value, [])
            made.extend(self._under(str(number), item) for number, item in enumerate(value))
            return made
        if isinstance(value, tuple) and (kind is tuple or hasattr(kind, "_fields")):
            return tuple.__new__(kind, map(self.visit, value))
        if kind is np.ndarray and not value.dtype.hasobject:
            return self._remember(value, value.copy(order="K"))
        if dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
            made = self._remember(value, copy.copy(value))
            for name, item in vars(value).items():
                vars(made)[name] = self._under(name, item)
            return made
        return copy.deepcopy(value, self._made)

    def _under(self, key: str, item: Any) -> Any:
        self._path.append(key)
        made = self.visit(item)
        self._path.pop()
        return made

    def _remember(self, original: Any, made: Any) -> Any:
        self._made[id(original)] = made
        return made

    def _dict(self, value: Any) -> Any:
        made: Any = type(value)() if type(value) is not defaultdict else defaultdict(value.default_factory)
        self._remember(value, made)
        for key, item in value.items():
            made[key] = self._under(str(key), item)
        if hasattr(value, "_metadata"):  # a state dict's versions, which loading reads
            made._metadata = copy.deepcopy(value._metadata)
        return made

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return tensor
        storage = tensor.untyped_storage() if _ordinary(tensor) else None
        if storage is None or storage.nbytes() == 0 or storage.data_ptr() == 0:
            return _like(tensor, tensor.detach().clone().cpu())
        made = torch.empty(0, dtype=tensor.dtype)
        if isinstance(tensor, torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=False)
        self.views.append(_View(made, tensor, self._part(tensor, storage)))
        return made

    def _part(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> int:
        key = storage.data_ptr(), storage.nbytes()
        number = self._numbers.setdefault(key, len(self.parts))
        if number == len(self.parts):
            address, size = key
            whole = tensor.nbytes == size and tensor.data_ptr() == address
            waits = whole and can_wait(tensor) and size <= self._lazy.get(address, 0)
            self.parts.append(_Part(".".join(self._path), tensor, storage, size, self.size, waits))
            self.size += -(-size // _ALIGN_BYTES) * _ALIGN_BYTES
        return number


def _ordinary(tensor: torch.Tensor) -> bool:
    """Whether it is a view of plain memory: no subclass, and no bits that a view of the storage would lose."""
    return (
        tensor.layout is torch.strided
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
    )


def _like(original: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    if isinstance(original, torch.nn.Parameter):
        return torch.nn.Parameter(made, requires_grad=original.requires_grad)
    return made.requires_grad_(original.requires_grad)
