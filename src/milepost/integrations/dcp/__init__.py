"""Milepost's storage for ``torch.distributed.checkpoint`` (DCP)."""

from milepost.integrations.dcp.foreign import load_distcp
from milepost.integrations.dcp.planner import MilepostSavePlanner
from milepost.integrations.dcp.reader import MilepostReader
from milepost.integrations.dcp.stager import MilepostStager
from milepost.integrations.dcp.training_state import TrainingState
from milepost.integrations.dcp.writer import MilepostWriter

__all__ = ["MilepostReader", "MilepostSavePlanner", "MilepostStager", "MilepostWriter", "TrainingState", "load_distcp"]
