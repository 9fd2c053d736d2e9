"""Milepost: a PyTorch trainer with pluggable checkpoint I/O, and the checkpoint engine beneath it."""

from milepost._lazy import lazy_names

__version__ = "0.1.0.dev0"

_NAMES = {
    "Trainer": "milepost.trainer.trainer",
    "Module": "milepost.trainer.module",
    "LightningModule": "milepost.trainer.module",
    "DataModule": "milepost.trainer.datamodule",
    "LightningDataModule": "milepost.trainer.datamodule",
    "Callback": "milepost.callbacks.callback",
    "OfAllRanks": "milepost._distributed",
    "PerRank": "milepost._distributed",
    "Checkpointer": "milepost.engine.checkpointer",
    "RandomState": "milepost.data.rng",
    "seed_everything": "milepost.data.rng",
}
_PARTS = ("callbacks", "loggers", "plugins", "profilers", "strategies", "utilities")  # `pl.callbacks`, as users write
__all__ = ["__version__", *sorted(_NAMES)]
__getattr__, __dir__ = lazy_names(__name__, _NAMES, _PARTS)
