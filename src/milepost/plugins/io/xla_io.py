"""Checkpoints of XLA devices: torch_xla's own save brings the tensors to the host, the file is written as any other."""

from __future__ import annotations

from typing import IO, Any

from milepost import _optional
from milepost.format import sealed
from milepost.plugins.io.torch_io import TorchCheckpointIO


class XLACheckpointIO(TorchCheckpointIO):
    """`TorchCheckpointIO` for TPU strategies: ``xm.save`` serialises, into the same whole, durable and sealed file.

    Raises:
        MissingDependencyError: torch_xla is not installed.
    """

    def __init__(self, *, allow_pickle: bool = False) -> None:
        super().__init__(allow_pickle=allow_pickle)
        self._model = _optional.require("torch_xla.core.xla_model", extra="xla", needed_by="XLACheckpointIO")

    def _write(self, plain: dict[str, Any], file: IO[bytes]) -> None:
        # The strategy has decided which process saves. Left to itself xm.save writes on each host's first process
        # only, and returns without a word, and without a file, on any other.
        sealed.write(file, lambda out: self._model.save(plain, out, master_only=False))
