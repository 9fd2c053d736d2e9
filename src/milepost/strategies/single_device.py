"""One process, one device."""

from __future__ import annotations

from typing import Any

import torch

from milepost import _distributed
from milepost.errors import MisconfigurationException
from milepost.strategies.strategy import Strategy


class SingleDeviceStrategy(Strategy):
    """Run on one device.

    Args:
        device: such as ``torch.device("cpu")`` or ``"cuda:0"``.
        checkpoint_io: how checkpoints are stored.
    """

    def __init__(
        self, device: torch.device | str | int = "cpu", accelerator: Any = None, checkpoint_io: Any = None
    ) -> None:
        super().__init__(checkpoint_io)
        self._device = torch.device(device)

    @property
    def root_device(self) -> torch.device:
        return self._device

    def place(self, accelerator: str, devices: Any, num_nodes: int) -> None:
        """Refuse to be one of several: each rank would make the whole run, and write the same files.

        Raises:
            MisconfigurationException: a launcher has started several ranks.
        """
        if _distributed.is_among_others():
            raise MisconfigurationException(
                f"devices={devices!r} on one of several ranks: each would make the whole run and write the same files."
                " Leave devices at 'auto' and strategy at 'auto' or 'ddp', so that they train together; for a run on"
                " one rank after that, call torch.distributed.destroy_process_group() first. Without either, remove"
                " RANK and WORLD_SIZE from os.environ."
            )
