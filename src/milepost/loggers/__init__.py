"""Loggers: where metrics and hyperparameters go."""

from milepost._lazy import lazy_names

_NAMES = {
    "Logger": "milepost.loggers.logger",
    "DummyLogger": "milepost.loggers.logger",
    "CSVLogger": "milepost.loggers.csv_logs",
    "TensorBoardLogger": "milepost.loggers.tensorboard",
}
__all__ = sorted(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
