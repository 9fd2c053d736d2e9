"""Average the weights of the last epochs, trained at a learning rate of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import SWALR

from milepost.callbacks.callback import Callback
from milepost.callbacks.weight_averaging import without_trainer
from milepost.core.schedules import SchedulerConfig, scheduler_state
from milepost.errors import MisconfigurationException

if TYPE_CHECKING:
    from milepost.trainer.module import Module
    from milepost.trainer.trainer import Trainer

AverageFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class StochasticWeightAveraging(Callback):
    """Stochastic weight averaging (Izmailov et al., "Averaging Weights Leads to Wider Optima", UAI 2018).

    From epoch `swa_epoch_start` on, the optimizer's scheduler gives way to ``SWALR``, which moves the learning rates to
    `swa_lrs`, and the weights at the start of each epoch enter the average. When training ends, the module takes the
    average. A module with batch norm then makes one more pass over the training data, without gradients, hooks or
    records, which gives its layers the statistics of the averaged weights.

    The average, the count and the scheduler are in the checkpoint, so that a run killed anywhere goes on with them.
    ``state_dict`` of the checkpoint holds the weights being trained; for a file of the averaged ones call
    ``trainer.save_checkpoint`` after ``fit``.

    Args:
        swa_lrs: learning rate to go to; a list gives one for each parameter group.
        swa_epoch_start: the epoch, counted from 1, from which on is averaged (int), or a fraction of ``max_epochs``.
        annealing_epochs: epochs in which the learning rate moves to `swa_lrs`.
        annealing_strategy: ``"cos"`` or ``"linear"``.
        avg_fn: from the average, the weights and the number of models averaged so far to the new average; the plain
            mean if None.
        device: where the average is kept; beside the model's weights if None.

    Raises:
        MisconfigurationException: an argument that cannot work; or, when fit starts, several optimizers or schedulers,
            or a fraction without ``max_epochs``, or batch norm under manual optimization.
    """

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: str = "cos",
        avg_fn: AverageFn | None = None,
        device: torch.device | str | None = torch.device("cpu"),  # noqa: B008 - frozen, and Lightning's default
    ) -> None:
        _check(swa_lrs, swa_epoch_start, annealing_epochs, annealing_strategy)
        self._swa_lrs = swa_lrs
        self._swa_epoch_start = swa_epoch_start
        self._annealing_epochs = annealing_epochs
        self._annealing_strategy = annealing_strategy
        self._avg_fn = avg_fn or self.avg_fn
        self._device = device
        self._max_epochs = -1
        self._begin()

    def _begin(self) -> None:
        self.n_averaged: torch.Tensor | None = None
        self._latest_update_epoch = -1
        self._average_model: Module | None = None
        self._scheduler: SWALR | None = None
        self._restored: dict[str, Any] = {}

    @property
    def swa_start(self) -> int:
        """Index from 0 of the first epoch that is averaged."""
        start = self._swa_epoch_start
        return max((int(self._max_epochs * start) if isinstance(start, float) else start) - 1, 0)

    @property
    def swa_end(self) -> int | float:
        """Index from 0 of the last epoch that is averaged."""
        return float("inf") if self._max_epochs == -1 else self._max_epochs - 1

    @staticmethod
    def avg_fn(
        averaged_model_parameter: torch.Tensor, model_parameter: torch.Tensor, num_averaged: torch.Tensor
    ) -> torch.Tensor:
        """The plain mean: what a further model adds to the average of `num_averaged`."""
        return averaged_model_parameter + (model_parameter - averaged_model_parameter) / (num_averaged + 1)

    # ---- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "n_averaged": 0 if self.n_averaged is None else int(self.n_averaged.item()),
            "latest_update_epoch": self._latest_update_epoch,
            "scheduler_state": None if self._scheduler is None else scheduler_state(self._scheduler),
            "average_model_state": None if self._average_model is None else self._average_model.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict)
        self._latest_update_epoch = state_dict["latest_update_epoch"]

    # ---- the run -------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage == "fit":
            self._begin()

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._check_run(trainer, pl_module)
        self._max_epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
        with without_trainer(pl_module):
            self._average_model = copy.deepcopy(pl_module)
        if self._device is not None:
            self._average_model.to(self._device)
        self.n_averaged = torch.tensor(self._restored.get("n_averaged", 0), device=pl_module.device)
        average = self._restored.get("average_model_state")
        if average is not None:
            self._average_model.load_state_dict(average)
        if self._restored.get("scheduler_state") is not None:
            # Here, and not at the next epoch's start: the checkpoint's scheduler state is about to be restored into it.
            self._take_over_schedule(trainer)
        self._restored = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        epoch = trainer.current_epoch
        if not self.swa_start <= epoch <= self.swa_end:
            return
        if self._scheduler is None:
            self._take_over_schedule(trainer)
        if epoch > self._latest_update_epoch:
            self._update(pl_module)
            self._latest_update_epoch = epoch

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        if not self.n_averaged:
            return
        assert self._average_model is not None
        trainer.finish_staging()
        with torch.no_grad():
            for averaged, parameter in zip(self._average_model.parameters(), pl_module.parameters(), strict=True):
                parameter.copy_(averaged)
        if layers := _batch_norms(pl_module):
            with _cumulative_statistics(layers):
                trainer.fit_loop.pass_over_data()

    @torch.no_grad()
    def _update(self, pl_module: Module) -> None:
        assert self._average_model is not None and self.n_averaged is not None
        first = not self.n_averaged
        for averaged, parameter in zip(self._average_model.parameters(), pl_module.parameters(), strict=True):
            new = parameter.to(averaged.device)
            averaged.copy_(new if first else self._avg_fn(averaged, new, self.n_averaged.to(averaged.device)))
        self.n_averaged += 1

    def _take_over_schedule(self, trainer: Trainer) -> None:
        optimizer = trainer.optimizers[0]
        rates = self._swa_lrs if isinstance(self._swa_lrs, list) else [self._swa_lrs] * len(optimizer.param_groups)
        if len(rates) != len(optimizer.param_groups):
            raise MisconfigurationException(
                f"swa_lrs={rates!r}: {len(rates)} learning rates for {len(optimizer.param_groups)} parameter groups."
                " Give one for each group, or a single float."
            )
        self._scheduler = SWALR(
            optimizer,
            swa_lr=rates,  # type: ignore[arg-type]  # torch takes a list, its annotation does not say so
            anneal_epochs=self._annealing_epochs,
            anneal_strategy=self._annealing_strategy,  # type: ignore[arg-type]
        )
        trainer.lr_scheduler_configs[:] = [SchedulerConfig(self._scheduler)]

    def _check_run(self, trainer: Trainer, pl_module: Module) -> None:
        if len(trainer.optimizers) != 1 or len(trainer.lr_scheduler_configs) > 1:
            raise MisconfigurationException(
                "StochasticWeightAveraging works with one optimizer and at most one scheduler; configure_optimizers"
                f" returned {len(trainer.optimizers)} and {len(trainer.lr_scheduler_configs)}."
            )
        if isinstance(self._swa_epoch_start, float) and trainer.max_epochs in (None, -1):
            raise MisconfigurationException(
                f"swa_epoch_start={self._swa_epoch_start} is a fraction of max_epochs, which is not limited. Give an"
                " int, or Trainer(max_epochs=...)."
            )
        if not pl_module.automatic_optimization and _batch_norms(pl_module):
            raise MisconfigurationException(
                "StochasticWeightAveraging gives batch norm new statistics by running training_step once more, which"
                " under manual optimization would train. Use WeightAveraging, or automatic optimization."
            )


def _check(rates: Any, start: Any, annealing_epochs: Any, strategy: Any) -> None:
    given = rates if isinstance(rates, list) else [rates]
    if not given or any(isinstance(r, bool) or not isinstance(r, int | float) or r <= 0 for r in given):
        raise MisconfigurationException(f"swa_lrs={rates!r}: give a positive float, or a list of them.")
    whole = isinstance(start, int) and not isinstance(start, bool) and start >= 1
    if not whole and not (isinstance(start, float) and 0.0 <= start <= 1.0):
        raise MisconfigurationException(
            f"swa_epoch_start={start!r}: give an epoch (int from 1 on) or a fraction of max_epochs (float, 0.0 to 1.0)."
        )
    if not isinstance(annealing_epochs, int) or annealing_epochs < 0:
        raise MisconfigurationException(f"annealing_epochs={annealing_epochs!r}: give a number of epochs, 0 or more.")
    if strategy not in ("cos", "linear"):
        raise MisconfigurationException(f"annealing_strategy={strategy!r}: give 'cos' or 'linear'.")


def _batch_norms(module: torch.nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def _cumulative_statistics(layers: list[_BatchNorm]) -> Iterator[None]:
    """Inside, `layers` begin their running statistics anew, as the plain mean over all batches."""
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
