"""The trainer: what runs, in which order, and what is saved of it."""

from milepost._lazy import lazy_names

_NAMES = {"Trainer": "milepost.trainer.trainer", "seed_everything": "milepost.data.rng"}
__all__ = sorted(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
