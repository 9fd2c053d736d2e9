"""Random numbers that leave no trace, under the name that Lightning users know."""

from __future__ import annotations

from contextlib import AbstractContextManager

from milepost.data.rng import isolated_rng

__all__ = ["isolate_rng"]


def isolate_rng(include_cuda: bool = True) -> AbstractContextManager[None]:
    """Whatever is drawn or seeded inside leaves the random state outside as it was, CUDA's always included."""
    return isolated_rng()
