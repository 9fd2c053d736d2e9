"""Which of the built-in plugins reads what is at a path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milepost.plugins.io.checkpoint_io import CheckpointIO
from milepost.plugins.io.parts import record_path
from milepost.plugins.io.safetensors_io import SafetensorsCheckpointIO
from milepost.plugins.io.snapshot_io import SnapshotCheckpointIO
from milepost.plugins.io.torch_io import TorchCheckpointIO


def reader_of(path: Any) -> CheckpointIO:
    """The plugin that wrote what is at `path`, by its form; `TorchCheckpointIO` for a stream, and where nothing is."""
    if hasattr(path, "read"):
        return TorchCheckpointIO()
    place = Path(path)
    if (record := Path(record_path(place))).exists():  # in parts, each of that form
        place = record
    if place.is_dir():
        return SnapshotCheckpointIO()
    return SafetensorsCheckpointIO() if place.is_file() and _is_safetensors(place) else TorchCheckpointIO()


def _is_safetensors(path: Path) -> bool:
    # Eight bytes of length, then a JSON object; a torch file begins as a zip or a pickle does.
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"
