"""Clipping gradients, also of parameters that are spread over ranks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm


def clip_norm(parameters: Sequence[torch.Tensor], limit: float) -> None:
    """Scale all gradients so that the norm of all of them together is at most `limit`."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not any(map(_is_spread, gradients)):
        clip_grad_norm_(parameters, limit)
        return
    by_mesh: dict[Any, list[Any]] = {}
    for parameter in parameters:
        gradient: Any = parameter.grad
        if gradient is not None:
            by_mesh.setdefault(gradient.device_mesh if _is_spread(gradient) else None, []).append(parameter)
    norms: list[torch.Tensor] = []
    for group in by_mesh.values():
        norm: Any = get_total_norm([parameter.grad for parameter in group])
        norms.append(norm.full_tensor() if _is_spread(norm) else norm)
    whole = torch.linalg.vector_norm(torch.stack(norms))
    for group in by_mesh.values():
        clip_grads_with_norm_(group, limit, whole)


def clip_values(parameters: Sequence[torch.Tensor], limit: float) -> None:
    """Cut every element of the gradients off at `limit`."""
    spread = [p for p in parameters if p.grad is not None and _is_spread(p.grad)]
    clip_grad_value_([p for p in parameters if not any(p is other for other in spread)], limit)
    for parameter in spread:
        gradient: Any = parameter.grad
        gradient.to_local().clamp_(-limit, limit)


def _is_spread(tensor: Any) -> bool:
    tensors = sys.modules.get("torch.distributed.tensor")  # imported by whoever has made one
    return tensors is not None and isinstance(tensor, tensors.DTensor)
