"""Log how busy the device is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from milepost.accelerators.stats import accelerator_stats, cpu_stats
from milepost.callbacks.callback import Callback
from milepost.errors import MisconfigurationException

if TYPE_CHECKING:
    from milepost.trainer.module import Module
    from milepost.trainer.trainer import Trainer


class DeviceStatsMonitor(Callback):
    """Logs figures of the device before and after batches, every ``log_every_n_steps`` of them.

    A figure is named ``DeviceStatsMonitor.on_train_batch_start/cpu_percent``: the hook, then the figure's own name. CPU
    figures are in percent and come from psutil; those of a CUDA device are its allocator's (bytes and counts, see
    ``torch.cuda.memory_stats``).

    Args:
        cpu_stats: log the CPU's figures; None: only where the CPU is the device that trains.

    Raises:
        MisconfigurationException: when fit starts: the Trainer has no logger.
        MissingDependencyError: when fit starts: CPU figures are wanted and psutil is not installed.
    """

    def __init__(self, cpu_stats: bool | None = None) -> None:
        self._cpu_stats = cpu_stats

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage != "fit":
            return
        if not trainer.loggers:
            raise MisconfigurationException("DeviceStatsMonitor has nowhere to log to: give Trainer(logger=...)")
        if self._wants_cpu(trainer):
            cpu_stats()  # fails here rather than in the first batch, and begins the time that the next call looks back

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        self._log(trainer, "on_train_batch_start", trainer.logger_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._log(trainer, "on_train_batch_end", trainer.logger_step)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._log(trainer, "on_validation_batch_start", batch_idx)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._log(trainer, "on_validation_batch_end", batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._log(trainer, "on_test_batch_start", batch_idx)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._log(trainer, "on_test_batch_end", batch_idx)

    def _wants_cpu(self, trainer: Trainer) -> bool:
        own = trainer.strategy.root_device.type == "cpu"
        return own if self._cpu_stats is None else self._cpu_stats

    def _log(self, trainer: Trainer, hook: str, index: int) -> None:
        every = trainer.log_every_n_steps
        if not every or (index + 1) % every:
            return
        figures = accelerator_stats(trainer.strategy.root_device)
        if self._wants_cpu(trainer):
            figures.update(cpu_stats())
        if not figures:
            return
        for logger in trainer.loggers:
            separator = getattr(logger, "group_separator", "/")
            named = {f"{type(self).__qualname__}.{hook}{separator}{name}": value for name, value in figures.items()}
            logger.log_metrics(named, step=trainer.logger_step)
