"""How busy a device is, as figures by name."""

from __future__ import annotations

import torch

from milepost._optional import require


def cpu_stats() -> dict[str, float]:
    """Use of the machine's processors (since the last call), memory and swap, each in percent.

    Raises:
        MissingDependencyError: psutil is not installed.
    """
    psutil = require("psutil", extra="stats", needed_by="DeviceStatsMonitor")
    return {
        "cpu_percent": psutil.cpu_percent(),
        "cpu_vm_percent": psutil.virtual_memory().percent,
        "cpu_swap_percent": psutil.swap_memory().percent,
    }


def accelerator_stats(device: torch.device) -> dict[str, float]:
    """The allocator's counters of a CUDA device, as ``torch.cuda.memory_stats`` names them; nothing for the CPU."""
    return dict(torch.cuda.memory_stats(device)) if device.type == "cuda" else {}
