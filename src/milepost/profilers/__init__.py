"""Profilers: how long the parts of a run take."""

from milepost._lazy import lazy_names

_NAMES = {
    "Profiler": "milepost.profilers.profiler",
    "PassThroughProfiler": "milepost.profilers.profiler",
    "SimpleProfiler": "milepost.profilers.simple",
}
__all__ = sorted(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
