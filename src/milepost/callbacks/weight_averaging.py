"""Keep an average of the weights beside those that are trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from milepost.callbacks.callback import Callback

if TYPE_CHECKING:
    from milepost.trainer.module import Module
    from milepost.trainer.trainer import Trainer

_COMPILED = "_orig_mod."


@contextmanager
def without_trainer(module: Module) -> Iterator[None]:
    """Inside, `module` can be copied: it refers to its Trainer, and a copy of that would drag the whole run along."""
    trainer = module._trainer
    module.trainer = None
    try:
        yield
    finally:
        module.trainer = trainer


class WeightAveraging(Callback):
    """Averages the weights over training; validation, checkpoints and the finished model use the average.

    In a checkpoint, ``state_dict`` holds the averaged weights, ``current_model_state`` those being trained and
    ``averaging_state`` the number of averaged models. A run that is resumed from it goes on with both; any other loader
    finds the averaged ones. A checkpoint without them is taken as the first model of a new average.

    The copy is made once the weights are final, after ``configure_model`` and after a checkpoint was read. Models whose
    parameters are spread over ranks are not supported.

    Args:
        device: where the averaged weights are kept; beside the model's if None.
        use_buffers: average buffers too, rather than copy the current ones.
        kwargs: passed to ``torch.optim.swa_utils.AveragedModel``, such as ``avg_fn``.
    """

    def __init__(self, device: torch.device | str | int | None = None, use_buffers: bool = True, **kwargs: Any) -> None:
        self._device = torch.device(device) if isinstance(device, str | int) else device
        self._use_buffers = use_buffers
        self._kwargs = kwargs
        self._average: AveragedModel | None = None
        self._exchanged = False  # the module holds the average, and self._average what is trained
        self._exchanged_for_validation = False
        self._latest_update_step = 0

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to take the weights into the average now. Override to choose when.

        Args:
            step_idx: index from 0 of the optimizer step just made, or None when asked at the end of an epoch.
            epoch_idx: index from 0 of the epoch that ends, or None when asked after a step.
        """
        return step_idx is not None

    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._latest_update_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._latest_update_step = state_dict["latest_update_step"]

    # ---- the run -------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage == "fit":
            self._average = None
            self._exchanged = self._exchanged_for_validation = False

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self._average is None:
            self._average = self._copy(pl_module)
        elif self._device is None:
            self._average.to(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        # While gradients accumulate, several batches end at the same step: it counts once.
        if trainer.global_step > self._latest_update_step and self.should_update(step_idx=trainer.global_step - 1):
            self._update(pl_module)
            self._latest_update_step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self.should_update(epoch_idx=trainer.current_epoch):
            self._update(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        # Exchanged, not overwritten: a checkpoint that is saved after this still has the weights to train on from.
        if not self._exchanged:
            self._exchange(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self._average is not None and not self._exchanged:
            self._exchange(trainer, pl_module)
            self._exchanged_for_validation = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end_validation(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        self._end_validation(trainer, pl_module)

    def _end_validation(self, trainer: Trainer, pl_module: Module) -> None:
        if self._exchanged_for_validation:
            self._exchange(trainer, pl_module)
            self._exchanged_for_validation = False

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        if self._average is None:
            return
        in_module = checkpoint["state_dict"]
        beside = {key.replace(_COMPILED, ""): value for key, value in self._average.module.state_dict().items()}
        averaged, current = (in_module, beside) if self._exchanged else (beside, in_module)
        checkpoint["state_dict"] = averaged
        checkpoint["current_model_state"] = current
        checkpoint["averaging_state"] = {
            key: value for key, value in self._average.state_dict().items() if not key.startswith("module.")
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Called on a resume, after ``checkpoint["state_dict"]`` was loaded into the module."""
        if trainer.state.fn != "fit":
            return  # validate, test and predict look at the averaged weights, which are in the module by now
        if "current_model_state" not in checkpoint:
            return  # the average begins with the weights that the module has when fit starts
        self._average = self._copy(pl_module)
        self._average.load_state_dict(checkpoint["averaging_state"], strict=False)
        own = {key.replace(_COMPILED, ""): key for key in pl_module.state_dict()}
        weights = checkpoint["current_model_state"]
        if set(weights) != set(own):
            # Written by an older version of the module, whose on_load_checkpoint has translated the averaged weights
            # only. It translates whatever stands under state_dict.
            translated = {**checkpoint, "state_dict": dict(weights)}
            pl_module.on_load_checkpoint(translated)
            weights = translated["state_dict"]
        current = {own.get(key, key): value for key, value in weights.items()}
        pl_module.load_state_dict(current, strict=pl_module.strict_loading)

    # ---- weights -------------------------------------------------------------------------------------------------

    def _copy(self, pl_module: Module) -> AveragedModel:
        with without_trainer(pl_module):
            return AveragedModel(pl_module, device=self._device, use_buffers=self._use_buffers, **self._kwargs)

    def _update(self, pl_module: Module) -> None:
        assert self._average is not None
        self._average.update_parameters(pl_module)

    @torch.no_grad()
    def _exchange(self, trainer: Trainer, pl_module: Module) -> None:
        trainer.finish_staging()
        assert self._average is not None
        for ours, theirs in zip(_tensors(self._average.module), _tensors(pl_module), strict=True):
            kept = ours.detach().clone()
            ours.detach().copy_(theirs)
            theirs.detach().copy_(kept)
        self._exchanged = not self._exchanged


class EMAWeightAveraging(WeightAveraging):
    """Exponential moving average: ``average = decay * average + (1 - decay) * weights`` at each update.

    Args:
        device: where the averaged weights are kept; beside the model's if None.
        use_buffers: average buffers too, rather than copy the current ones.
        decay: weight of the past, between 0 and 1.
        update_every_n_steps: optimizer steps between two updates; 0 for none by steps.
        update_starting_at_step: index of the first step that may update; None for the first.
        update_starting_at_epoch: also update at the end of each epoch from this one on; None for never.
        kwargs: passed to ``torch.optim.swa_utils.AveragedModel``.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        **kwargs: Any,
    ) -> None:
        average = get_ema_avg_fn(decay)  # type: ignore[no-untyped-call]
        super().__init__(device, use_buffers, avg_fn=average, **kwargs)
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is not None:
            begun = self.update_starting_at_step is None or step_idx >= self.update_starting_at_step
            return begun and self.update_every_n_steps > 0 and step_idx % self.update_every_n_steps == 0
        first = self.update_starting_at_epoch
        return epoch_idx is not None and first is not None and epoch_idx >= first


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(module.parameters(), module.buffers())
