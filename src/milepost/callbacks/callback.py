"""The base class of callbacks: every hook, each of which does nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from milepost.trainer.module import Module
    from milepost.trainer.trainer import Trainer


class Callback:
    """Self-contained behaviour hung on the events of a run. Override the hooks that you need."""

    @property
    def state_key(self) -> str:
        """Key of this callback's state in ``checkpoint["callbacks"]``. Callbacks whose keys collide get a suffix."""
        return type(self).__qualname__

    def _generate_state_key(self, **kwargs: Any) -> str:
        """A state key that tells instances apart by `kwargs`."""
        return f"{type(self).__qualname__}{kwargs!r}"

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart. Plain values and tensors; an empty dict is not saved."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned when the checkpoint was written."""

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Called when fit, validate, test or predict begins; `stage` names which."""

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Called when fit, validate, test or predict ends, after an error too."""

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when fit begins, after the model is on its device."""

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when fit ends."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called before the sanity check of validation."""

    def on_sanity_check_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called after the sanity check of validation."""

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called before the first epoch of this fit."""

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called after the last epoch of this fit."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when a training epoch begins; not when it is resumed midway."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when a training epoch ends."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        """Called before `training_step`."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Called after the optimizer and step schedulers moved."""

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when the validation loop begins."""

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when the validation loop ends, its metrics logged."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when the validation epoch begins."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when the validation epoch ends, before its metrics are logged."""

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before the validation step."""

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called after the validation step."""

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when the test loop begins."""

    def on_test_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when the test loop ends, its metrics logged."""

    def on_test_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when the test epoch begins."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when the test epoch ends, before its metrics are logged."""

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before the test step."""

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called after the test step."""

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when the predict loop begins."""

    def on_predict_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when the predict loop ends, its metrics logged."""

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when the predict epoch begins."""

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when the predict epoch ends, before its metrics are logged."""

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before the predict step."""

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called after the predict step."""

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        """Called when the run is interrupted by `exception`, before teardown."""

    def on_before_backward(self, trainer: Trainer, pl_module: Module, loss: torch.Tensor) -> None:
        """Called before ``loss.backward()``."""

    def on_after_backward(self, trainer: Trainer, pl_module: Module) -> None:
        """Called after ``loss.backward()``, before the optimizer step."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Module, optimizer: torch.optim.Optimizer) -> None:
        """Called before the optimizer step, gradients unscaled but not clipped."""

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Module, optimizer: torch.optim.Optimizer) -> None:
        """Called before gradients are zeroed."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Called while a checkpoint is built. Edit `checkpoint` in place to change what is saved."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint was read, before the callback states are set."""
