"""From the Trainer's ``accelerator``, ``devices`` and ``num_nodes`` to the devices of this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from milepost import _distributed
from milepost.errors import MisconfigurationException


@dataclass(frozen=True)
class Placement:
    """Where a run takes place: one rank for each device of each machine.

    Attributes:
        devices: of one machine; a CPU stands there as often as it has ranks.
        nodes: how many machines.
    """

    devices: tuple[torch.device, ...]
    nodes: int = 1

    @property
    def ranks(self) -> int:
        return len(self.devices) * self.nodes


def place(accelerator: str, devices: Any, num_nodes: int) -> Placement:
    """Resolve the three arguments. Under a launcher ``devices="auto"`` means what the launcher has started.

    Raises:
        MisconfigurationException: there is no such accelerator or device, or the launcher has started other ranks.
    """
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise MisconfigurationException(
            f"Trainer(accelerator={accelerator!r}) is not supported: use 'auto', 'cpu', 'gpu' or 'tpu'."
        )
    if not isinstance(num_nodes, int) or num_nodes < 1:
        raise MisconfigurationException(f"num_nodes={num_nodes!r}: give the number of machines, 1 or more.")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator in ("gpu", "cuda") and not there:
        raise MisconfigurationException(
            f"accelerator={accelerator!r}, but torch sees no CUDA device. Use accelerator='cpu' or 'auto'."
        )
    launched = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) if _distributed.is_launched() else 0
    cuda = there > 0 and accelerator != "cpu"
    asked = _asked(devices, there if cuda else 1, launched)
    if cuda and any(index >= there for index in asked):
        raise MisconfigurationException(f"devices={devices!r}, but torch sees {there} CUDA devices.")
    found = tuple(torch.device("cuda", index) if cuda else torch.device("cpu") for index in asked)
    if launched and devices == "auto":
        num_nodes = max(num_nodes, int(os.environ["WORLD_SIZE"]) // launched)
    return Placement(found, num_nodes)


def _asked(devices: Any, there: int, launched: int) -> list[int]:
    """Indices of the devices asked for; for the CPU their number counts."""
    if isinstance(devices, str) and devices != "auto":
        parts = [part for part in devices.split(",") if part.strip()]
        try:
            numbers = [int(part) for part in parts]
        except ValueError:
            numbers = []
        devices = numbers[0] if len(numbers) == 1 and "," not in devices else numbers
    if devices in ("auto", None):
        return list(range(launched or there))
    if devices == -1:
        return list(range(there))
    if isinstance(devices, int) and not isinstance(devices, bool) and devices > 0:
        return list(range(devices))
    if isinstance(devices, (list, tuple)) and devices and all(isinstance(d, int) and d >= 0 for d in devices):
        return list(devices)
    raise MisconfigurationException(
        f"devices={devices!r}: give their number (1 or more), a list of indices, -1 for all, or 'auto'."
    )
