"""Conformance suites: whoever writes a plugin proves it with the tests that ours pass."""

from milepost._lazy import lazy_names

_NAMES = {"CheckpointIOTests": "milepost.testing.checkpoint_io"}
__all__ = sorted(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
