"""Milepost's storage for ``torch.distributed.checkpoint`` (DCP)."""

from milepost.integrations.dcp.foreign import load_distcp
from milepost.integrations.dcp.reader import MilepostReader
from milepost.integrations.dcp.stager import MilepostStager

__all__ = ["MilepostReader", "MilepostStager", "load_distcp"]
