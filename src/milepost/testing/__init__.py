"""Conformance suites: whoever writes a plugin proves it with the tests that ours pass. See docs/testing.md."""

from milepost._lazy import lazy_names

_NAMES = {
    "CheckpointIOTests": "milepost.testing.checkpoint_io",
    "CrashState": "milepost.testing.crashes",
    "Fault": "milepost.testing.faulty_store",
    "FaultyStore": "milepost.testing.faulty_store",
    "RecordingStore": "milepost.testing.recording",
    "StoreTests": "milepost.testing.store",
    "run_ranks": "milepost.testing.ranks",
    "crash_states": "milepost.testing.crashes",
}
__all__ = sorted(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
