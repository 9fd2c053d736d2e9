"""Holding the garbage collector back while many small objects are built."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_holding = 0
_was_enabled = False


@contextmanager
def collector_paused() -> Iterator[None]:
    """No passes of the collector: with 20,000 tensors it would walk over what is being built again and again.

    Measured with `benchmarks/checkpoint_speed.py small`: a third of the time of a save. Several threads may hold it.
    """
    global _holding, _was_enabled
    with _lock:
        if _holding == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _holding += 1
    try:
        yield
    finally:
        with _lock:
            _holding -= 1
            if _holding == 0 and _was_enabled:
                gc.enable()
