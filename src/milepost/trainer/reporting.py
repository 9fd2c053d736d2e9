"""What goes out to loggers and to the terminal, and under which step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from milepost.data.rng import isolated_rng
from milepost.errors import MisconfigurationException

if TYPE_CHECKING:
    from milepost.trainer.module import Module
    from milepost.trainer.trainer import Trainer


class Reports:
    """Sends the values of a step or an epoch to all loggers."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def step(self, accumulating: bool) -> None:
        """After a training batch: every `log_every_n_steps` batches that stepped, and at the last one."""
        trainer = self._trainer
        every = trainer.log_every_n_steps
        if not every or (accumulating and trainer.lightning_module.automatic_optimization):
            return
        if (trainer.logger_step + 1) % every == 0 or trainer.should_stop or trainer.fast_dev_run:
            self.send(trainer.metrics.step_values(), trainer.logger_step)

    def epoch(self, step: int) -> None:
        """After a training epoch."""
        metrics = self._trainer.metrics
        self.send(metrics.epoch_values(), step)
        metrics.end_training_epoch()

    def send(self, values: dict[str, Any], step: int, *, with_epoch: bool = True) -> None:
        """Hand scalar `values` to the loggers, with the epoch; a value logged as ``step`` takes the place of `step`.

        The loggers are told to write them out: the run may be killed.
        """
        loggers = self._trainer.loggers
        if not values or not loggers:
            return
        numbers = {name: float(value) for name, value in values.items()}
        if with_epoch and "step" in numbers:
            step = int(numbers.pop("step"))
        elif with_epoch:
            numbers.setdefault("epoch", self._trainer.current_epoch)
        for logger in loggers:
            logger.log_metrics(numbers, step=step)
            logger.save()

    def hyperparams(self, model: Module) -> None:
        """Before the first batch: the hyper-parameters of the data module and of `model`."""
        trainer = self._trainer
        if not trainer.enable_autolog_hparams or not trainer.loggers:
            return
        merged: dict[str, Any] = {}
        for owner in (trainer.datamodule, model):
            if owner is not None and owner._log_hyperparams:
                shared = merged.keys() & owner.hparams.keys()
                if clash := sorted(name for name in shared if repr(merged[name]) != repr(owner.hparams[name])):
                    raise MisconfigurationException(
                        f"The module and the data module have saved other values of the hyper-parameter {clash[0]!r}:"
                        " rename it in one of them, or call save_hyperparameters(logger=False) there."
                    )
                merged.update(owner.hparams)
        for logger in trainer.loggers:
            if merged:
                logger.log_hyperparams(merged)
            if hasattr(logger, "log_graph"):
                with isolated_rng():  # drawing runs the module
                    logger.log_graph(model)
            logger.save()


def print_results(results: list[dict[str, float]]) -> None:
    """Print the metrics of validate or test, a line per loader."""
    for index, metrics in enumerate(results):
        title = f"DataLoader {index}: " if len(results) > 1 else ""
        values = (f"{name.split('/dataloader_idx_')[0]}={value:.6g}" for name, value in sorted(metrics.items()))
        print(title + "  ".join(values))
