"""The hooks of a module and of a data source, under the names that Lightning users know."""

from __future__ import annotations

from typing import Any

import torch


class CheckpointHooks:
    """*What* is saved: edit the checkpoint on its way out and in. *How* it is stored is a `CheckpointIO`'s matter."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called while a checkpoint is built, on every rank. Edit `checkpoint` in place to change what is saved."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint was read, before any state is set from it. Take back what you added."""


class ModelHooks:
    """Events of a run, as a `Module` sees them. Each does nothing."""

    def on_fit_start(self) -> None:
        """Called when fit begins, after the module is on its device."""

    def on_fit_end(self) -> None:
        """Called when fit ends."""

    def on_train_start(self) -> None:
        """Called before the first epoch of this fit."""

    def on_train_end(self) -> None:
        """Called after the last epoch of this fit."""

    def on_train_epoch_start(self) -> None:
        """Called when a training epoch begins; not when it is resumed midway."""

    def on_train_epoch_end(self) -> None:
        """Called when a training epoch ends."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Called before `training_step`. Return -1 to skip the rest of the epoch."""
        return None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Called after the optimizer and step schedulers moved."""

    def on_validation_start(self) -> None:
        """Called when the validation loop begins."""

    def on_validation_end(self) -> None:
        """Called when the validation loop ends, its metrics logged."""

    def on_validation_epoch_start(self) -> None:
        """Called when the validation epoch begins."""

    def on_validation_epoch_end(self) -> None:
        """Called when the validation epoch ends, before its metrics are logged."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before the validation step."""

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after the validation step."""

    def on_test_start(self) -> None:
        """Called when the test loop begins."""

    def on_test_end(self) -> None:
        """Called when the test loop ends, its metrics logged."""

    def on_test_epoch_start(self) -> None:
        """Called when the test epoch begins."""

    def on_test_epoch_end(self) -> None:
        """Called when the test epoch ends, before its metrics are logged."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before the test step."""

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after the test step."""

    def on_predict_start(self) -> None:
        """Called when the predict loop begins."""

    def on_predict_end(self) -> None:
        """Called when the predict loop ends, its metrics logged."""

    def on_predict_epoch_start(self) -> None:
        """Called when the predict epoch begins."""

    def on_predict_epoch_end(self) -> None:
        """Called when the predict epoch ends, before its metrics are logged."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before the predict step."""

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after the predict step."""

    def on_before_backward(self, loss: torch.Tensor) -> None:
        """Called before ``loss.backward()``."""

    def on_after_backward(self) -> None:
        """Called after ``loss.backward()``, before the optimizer step."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before the optimizer step, gradients unscaled but not clipped."""

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before gradients are zeroed."""

    def on_validation_model_eval(self) -> None:
        """Put the module in eval mode for the validation loop."""
        self.eval()  # type: ignore[attr-defined]

    def on_test_model_eval(self) -> None:
        """Put the module in eval mode for the test loop."""
        self.eval()  # type: ignore[attr-defined]

    def on_predict_model_eval(self) -> None:
        """Put the module in eval mode for the predict loop."""
        self.eval()  # type: ignore[attr-defined]

    def on_validation_model_train(self) -> None:
        """Called after the validation loop in place of restoring each submodule's mode; override to take over."""
        self.train()  # type: ignore[attr-defined]

    def on_test_model_train(self) -> None:
        """Called after the test loop in place of restoring each submodule's mode; override to take over."""
        self.train()  # type: ignore[attr-defined]

    def on_validation_model_zero_grad(self) -> None:
        """Free gradients before validation, at an accumulation boundary."""
        self.zero_grad()  # type: ignore[attr-defined]

    def configure_sharded_model(self) -> None:
        """The older name of `configure_model`, called before it. Override one of the two."""

    def configure_model(self) -> None:
        """Build the large parts of the module here. Called at every run: build once."""


class DataHooks:
    """Where batches come from."""

    def prepare_data(self) -> None:
        """Download or write data. Called once per node, before `setup`."""

    def setup(self, stage: str) -> None:
        """Called on every rank when fit, validate, test or predict begins."""

    def teardown(self, stage: str) -> None:
        """Called on every rank when the run ends."""

    def train_dataloader(self) -> Any:
        """One loader, or a nested list or dict of them, for the train loop."""
        raise NotImplementedError(
            f"{type(self).__name__} has no `train_dataloader`. Define it, or pass the loaders to the Trainer's method."
        )

    def val_dataloader(self) -> Any:
        """One loader, or a nested list or dict of them, for the val loop."""
        raise NotImplementedError(
            f"{type(self).__name__} has no `val_dataloader`. Define it, or pass the loaders to the Trainer's method."
        )

    def test_dataloader(self) -> Any:
        """One loader, or a nested list or dict of them, for the test loop."""
        raise NotImplementedError(
            f"{type(self).__name__} has no `test_dataloader`. Define it, or pass the loaders to the Trainer's method."
        )

    def predict_dataloader(self) -> Any:
        """One loader, or a nested list or dict of them, for the predict loop."""
        raise NotImplementedError(
            f"{type(self).__name__} has no `predict_dataloader`. Define it, or pass the loaders to the Trainer's"
            " method."
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move `batch` to `device`. Override for types of your own."""
        from milepost.trainer.transfer import move_to_device

        return move_to_device(batch, device)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change the batch before it moves to the device."""
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change the batch after it moved to the device."""
        return batch
