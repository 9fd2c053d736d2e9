"""Plugins that a Trainer takes."""

from milepost._lazy import lazy_names

_NAMES = {
    "CheckpointIO": "milepost.plugins.io.checkpoint_io",
    "TorchCheckpointIO": "milepost.plugins.io.torch_io",
    "XLACheckpointIO": "milepost.plugins.io.xla_io",
    "Preemption": "milepost.plugins.preemption",
    "AsyncCheckpointIO": "milepost.plugins.io.async_io",
    "SafetensorsCheckpointIO": "milepost.plugins.io.safetensors_io",
    "SnapshotCheckpointIO": "milepost.plugins.io.snapshot_io",
}
__all__ = sorted(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
