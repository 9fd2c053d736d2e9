"""Buffers that a module keeps out of its ``state_dict``, saved where training has changed them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_COMPILED = "_orig_mod."

Marks = dict[str, tuple[Tensor, int | None]]
"""Non-persistent buffers as they were, by name: the tensor itself (no copy), and its version."""


def mark_buffers(module: nn.Module) -> Marks:
    """Remember the non-persistent buffers of `module`, for `changed_buffers`."""
    return {name: (buffer, _version(buffer)) for name, buffer in _left_out(module)}


def changed_buffers(module: nn.Module, marks: Marks) -> dict[str, Tensor]:
    """Those that were replaced, or written to in place, since. A write through ``.data`` goes unseen.

    So tables that are computed once, positions or masks, do not make every checkpoint larger.
    """
    changed = {}
    for name, buffer in _left_out(module):
        known, version = marks.get(name, (None, None))
        if buffer is not known or version is None or _version(buffer) != version:
            changed[name] = buffer.detach()
    return changed


@torch.no_grad()
def restore_buffers(module: nn.Module, saved: dict[str, Any]) -> None:
    """Put back what `changed_buffers` returned. Names that the module lacks are left out."""
    for name, buffer in list(_left_out(module)):
        if name not in saved:
            continue
        owner, _, own_name = name.rpartition(".")
        value = saved[name].to(buffer.device)
        if value.shape == buffer.shape and value.dtype == buffer.dtype and not buffer.is_inference():
            buffer.copy_(value)
        else:
            setattr(dict(_named_modules(module))[owner], own_name, value.clone())


def _named_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, part in module.named_modules():
        yield path.replace(_COMPILED, ""), part


def _left_out(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, part in _named_modules(module):
        for name in part._non_persistent_buffers_set:
            buffer = part._buffers.get(name)
            if buffer is not None:
                yield f"{path}.{name}" if path else name, buffer


def _version(buffer: Tensor) -> int | None:
    return None if buffer.is_inference() else buffer._version
