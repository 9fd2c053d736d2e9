"""What the strategies of several ranks have in common: their processes, their group, their devices."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from milepost import _distributed
from milepost.errors import MisconfigurationException
from milepost.plugins.io import checkpoint_io as io_calls
from milepost.strategies.devices import Placement, place
from milepost.strategies.launch import relaunch
from milepost.strategies.sharding import is_spread
from milepost.strategies.strategy import Strategy


class ParallelStrategy(Strategy):
    """One process for each device. They are started by a launcher, such as torchrun, or by the Trainer itself.

    Args:
        checkpoint_io: how checkpoints are stored.
        process_group_backend: torch's name for it; gloo for CPUs, gloo and nccl for GPUs by default.
        timeout: after which a collective that does not come about is an error; torch's default if None.
    """

    def __init__(
        self,
        checkpoint_io: Any = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        super().__init__(checkpoint_io)
        self._backend = process_group_backend
        self._timeout = timeout
        self._placement: Placement | None = None

    @property
    def placement(self) -> Placement:
        """Where it runs; by default on what the launcher started, or on one device."""
        if self._placement is None:
            self._placement = place("auto", "auto", 1)
        return self._placement

    def place(self, accelerator: str, devices: Any, num_nodes: int) -> None:
        self._placement = placement = place(accelerator, devices, num_nodes)
        started = int(os.environ["WORLD_SIZE"]) if _distributed.is_launched() else placement.ranks
        if started != placement.ranks:
            raise MisconfigurationException(
                f"devices={devices!r} and num_nodes={num_nodes} make {placement.ranks} ranks, but the launcher has"
                f" started {started}. Give both the same numbers, or leave devices at 'auto'."
            )

    @property
    def root_device(self) -> torch.device:
        local = int(os.environ.get("LOCAL_RANK", 0))
        return self.placement.devices[local % len(self.placement.devices)]

    @property
    def num_devices(self) -> int:
        return len(self.placement.devices)

    @property
    def num_nodes(self) -> int:
        return self.placement.nodes

    @property
    def world_size(self) -> int:
        return _distributed.world_size() if _distributed.is_initialized() else self.placement.ranks

    @torch.no_grad()
    def broadcast_tensors(self, tensors: Iterable[torch.Tensor]) -> None:
        """Make plain `tensors` those of rank 0, in place."""
        if _distributed.world_size() == 1:
            return
        for tensor in tensors:
            if not is_spread(tensor):
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, src=0)
                if whole.data_ptr() != tensor.data_ptr():
                    tensor.detach().copy_(whole)

    def load_mapped(self, path: str, weights_only: bool | None) -> dict[str, Any]:
        """Read a checkpoint of which each rank needs a part; what is not used is not read, where the plugin can."""
        loaded: dict[str, Any] = io_calls.load(self.checkpoint_io, path, weights_only=weights_only, mapped=True)
        return loaded

    def launch(self) -> None:
        """Join the other ranks; where nobody has started them, start them: then this does not return."""
        if not _distributed.is_initialized() and not _distributed.is_launched() and self.placement.ranks > 1:
            relaunch(len(self.placement.devices), self.placement.nodes)
        device = self.root_device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        _distributed.start(self._backend or ("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"), self._timeout)
