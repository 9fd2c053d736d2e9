"""Checkpoints of XLA devices: torch_xla brings the tensors to the host, the file is written as any other."""

from __future__ import annotations

import os
from typing import Any

from milepost import _optional
from milepost.plugins.io.torch_io import TorchCheckpointIO


class XLACheckpointIO(TorchCheckpointIO):
    """`TorchCheckpointIO` for TPU strategies.

    torch_xla's own save moves tensors to the host and calls ``torch.save``; here the same move is followed by the
    durable, sealed write.

    Raises:
        MissingDependencyError: torch_xla is not installed.
    """

    def __init__(self, *, allow_pickle: bool = False) -> None:
        super().__init__(allow_pickle=allow_pickle)
        self._model = _optional.require("torch_xla.core.xla_model", extra="xla", needed_by="XLACheckpointIO")

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write `checkpoint` once its tensors are on the host."""
        super().save_checkpoint(self._model._maybe_convert_to_cpu(checkpoint), path, storage_options)
