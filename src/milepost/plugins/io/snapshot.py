"""A copy of a checkpoint that nothing done later can change."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter, OrderedDict, defaultdict
from typing import Any

import numpy as np
import torch


def snapshot(state: Any) -> Any:
    """A copy of `state`: tensors on the CPU, arrays and containers too. What shares memory goes on sharing it."""
    return _Snapshot().visit(state)


class _Snapshot:
    def __init__(self) -> None:
        self._storages: dict[tuple[int, int], torch.UntypedStorage] = {}
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
            made.extend(map(self.visit, value))
            return made
        if isinstance(value, tuple) and (kind is tuple or hasattr(kind, "_fields")):
            return tuple.__new__(kind, map(self.visit, value))
        if kind is np.ndarray and not value.dtype.hasobject:
            return self._remember(value, value.copy(order="K"))
        if dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
            made = self._remember(value, copy.copy(value))
            for name, item in vars(value).items():
                vars(made)[name] = self.visit(item)
            return made
        return copy.deepcopy(value, self._made)

    def _remember(self, original: Any, made: Any) -> Any:
        self._made[id(original)] = made
        return made

    def _dict(self, value: Any) -> Any:
        made: Any = type(value)() if type(value) is not defaultdict else defaultdict(value.default_factory)
        self._remember(value, made)
        for key, item in value.items():
            made[key] = self.visit(item)
        if hasattr(value, "_metadata"):  # a state dict's versions, which loading reads
            made._metadata = copy.deepcopy(value._metadata)
        return made

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        made = self._values(tensor.detach())
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
        return made.requires_grad_(tensor.requires_grad)

    def _values(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return tensor
        if tensor.layout is not torch.strided or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return tensor.clone().cpu()
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), storage.nbytes()
        if key[0] == 0 or tensor.is_conj() or tensor.is_neg():  # lazy bits that a view of the storage would lose
            return tensor.clone().cpu()
        if key not in self._storages:
            on_host = storage.device.type == "cpu"
            self._storages[key] = storage.clone() if on_host else storage.cpu()  # type: ignore[no-untyped-call]
        made = torch.empty(0, dtype=tensor.dtype)
        return made.set_(self._storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())
