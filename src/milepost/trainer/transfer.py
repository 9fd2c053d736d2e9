"""Moving and casting nested batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Return `value` with `change` applied to each tensor in mappings, sequences, named tuples and dataclasses."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        items = {k: map_tensors(v, change) for k, v in value.items()}
        return items if type(value) is dict else _rebuilt(value, items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, change) for v in value))
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return _rebuilt(value, [map_tensors(v, change) for v in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        return dataclasses.replace(value, **{name: map_tensors(getattr(value, name), change) for name in fields})
    return value


def move_to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor, and every object that has a ``to`` method of its own, to `device`."""
    if not isinstance(batch, torch.Tensor) and hasattr(batch, "to") and not dataclasses.is_dataclass(batch):
        return batch.to(device)
    if device.type == "cpu":
        return batch if _all_on_cpu(batch) else map_tensors(batch, lambda t: t.to(device))
    return map_tensors(batch, lambda t: t.to(device, non_blocking=True))


def _all_on_cpu(batch: Any) -> bool:
    if isinstance(batch, torch.Tensor):
        return batch.device.type == "cpu"
    if isinstance(batch, Mapping):
        return all(_all_on_cpu(v) for v in batch.values())
    if isinstance(batch, (list, tuple)):
        return all(_all_on_cpu(v) for v in batch)
    return not dataclasses.is_dataclass(batch)


def _rebuilt(like: Any, items: Any) -> Any:
    try:
        return type(like)(items)
    except TypeError:
        return items


def numbers_to_tensors(value: Any) -> Any:
    """Numbers in nested mappings and sequences as tensors; all else as it is."""
    if isinstance(value, bool | int | float):
        return torch.tensor(value)
    if isinstance(value, Mapping):
        return _rebuilt(value, {k: numbers_to_tensors(v) for k, v in value.items()})
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(numbers_to_tensors(v) for v in value)
    return value
