"""Moving a batch, under the name that Lightning users know."""

from __future__ import annotations

from typing import Any

import torch

from milepost.trainer.transfer import move_to_device

__all__ = ["move_data_to_device"]


def move_data_to_device(batch: Any, device: torch.device | str | int) -> Any:
    """`batch` with every tensor in it, and every object that has a ``to`` of its own, on `device`."""
    return move_to_device(batch, torch.device(device))
