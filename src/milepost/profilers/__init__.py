"""Profilers: how long the parts of a run take. By name in ``Trainer(profiler=...)``: simple, advanced, pytorch."""

from milepost._lazy import lazy_names

_NAMES = {
    "Profiler": "milepost.profilers.profiler",
    "PassThroughProfiler": "milepost.profilers.profiler",
    "SimpleProfiler": "milepost.profilers.simple",
    "AdvancedProfiler": "milepost.profilers.advanced",
    "PyTorchProfiler": "milepost.profilers.pytorch",
}
__all__ = sorted(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
