"""One process, one device."""

from __future__ import annotations

from typing import Any

import torch

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
