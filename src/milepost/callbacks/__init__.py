"""Callbacks: behaviour hung on the events of a run."""

from milepost._lazy import lazy_names

_NAMES = {
    "Callback": "milepost.callbacks.callback",
    "Checkpoint": "milepost.callbacks.checkpoint",
    "ModelCheckpoint": "milepost.callbacks.model_checkpoint",
    "KeepBest": "milepost.engine.retention",
    "KeepNewest": "milepost.engine.retention",
    "KeepEvery": "milepost.engine.retention",
    "KeepLadder": "milepost.engine.retention",
    "OnExceptionCheckpoint": "milepost.callbacks.on_exception",
    "EarlyStopping": "milepost.callbacks.early_stopping",
    "LearningRateMonitor": "milepost.callbacks.lr_monitor",
    "Timer": "milepost.callbacks.timer",
    "LambdaCallback": "milepost.callbacks.lambda_callback",
    "StochasticWeightAveraging": "milepost.callbacks.stochastic_weight_averaging",
    "BaseFinetuning": "milepost.callbacks.finetuning",
    "BackboneFinetuning": "milepost.callbacks.finetuning",
    "DeviceStatsMonitor": "milepost.callbacks.device_stats_monitor",
    "WeightAveraging": "milepost.callbacks.weight_averaging",
    "EMAWeightAveraging": "milepost.callbacks.weight_averaging",
    "GradientAccumulationScheduler": "milepost.callbacks.gradient_accumulation",
    "ModelSummary": "milepost.callbacks.model_summary",
    "RichModelSummary": "milepost.callbacks.model_summary",
    "ProgressBar": "milepost.callbacks.progress",
    "RichProgressBar": "milepost.callbacks.progress",
    "RichProgressBarTheme": "milepost.callbacks._progress_line",
    "TQDMProgressBar": "milepost.callbacks.progress",
    "BasePredictionWriter": "milepost.callbacks.prediction_writer",
}
__all__ = sorted(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
