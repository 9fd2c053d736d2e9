"""Checkpoint I/O: how a checkpoint is stored."""

from milepost._lazy import lazy_names

_NAMES = {
    "CheckpointIO": "milepost.plugins.io.checkpoint_io",
    "TorchCheckpointIO": "milepost.plugins.io.torch_io",
    "XLACheckpointIO": "milepost.plugins.io.xla_io",
    "AsyncCheckpointIO": "milepost.plugins.io.async_io",
    "SafetensorsCheckpointIO": "milepost.plugins.io.safetensors_io",
    "SnapshotCheckpointIO": "milepost.plugins.io.snapshot_io",
}
__all__ = sorted(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
