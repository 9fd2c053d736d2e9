"""Where the model runs, and through which CheckpointIO its checkpoints go."""

from milepost._lazy import lazy_names

_NAMES = {
    "Strategy": "milepost.strategies.strategy",
    "DeepSpeedStrategy": "milepost.strategies.deepspeed",
    "DDPStrategy": "milepost.strategies.ddp",
    "FSDPStrategy": "milepost.strategies.fsdp",
    "ModelParallelStrategy": "milepost.strategies.model_parallel",
    "ParallelStrategy": "milepost.strategies.parallel",
    "SingleDeviceStrategy": "milepost.strategies.single_device",
    "SingleDeviceXLAStrategy": "milepost.strategies.xla",
    "XLAStrategy": "milepost.strategies.xla",
}
__all__ = sorted(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
