"""What a training step logs for the epoch is known at the epoch's end, to callbacks and to schedulers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from milepost import LightningModule, Trainer
from milepost.callbacks import ModelCheckpoint
from milepost.errors import MisconfigurationException


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("level", float(10 * (self.current_epoch + 1) + batch_idx), on_step=False, on_epoch=True)
        loss: torch.Tensor = self.net(batch[0]).square().mean()
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("late", 100.0 + self.current_epoch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "level"}}


@pytest.mark.parametrize(("monitor", "expected"), [("level", [10.5, 20.5, 30.5]), ("late", [100.0, 101.0, 102.0])])
def test_checkpointers_and_plateaus_see_this_epochs_values(monitor: str, expected: list[float], tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "{epoch}", monitor=monitor, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu", max_epochs=3, logger=False, callbacks=[saves], enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Line(), DataLoader(TensorDataset(torch.ones(2, 1)), batch_size=1))
    assert [float(saves.best_k_models[str(tmp_path / f"epoch={n}.ckpt")]) for n in range(3)] == expected
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25, "the level rose twice after its first value"


class ByHand(Line):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)]


class Unnamed(ByHand):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True


def test_only_a_plateau_that_the_trainer_steps_must_name_its_metric() -> None:
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    data = DataLoader(TensorDataset(torch.ones(2, 1)), batch_size=1)
    trainer = Trainer(**options, max_epochs=1, enable_checkpointing=False)
    trainer.fit(ByHand(), data)
    assert len(trainer.lr_scheduler_configs) == 1
    with pytest.raises(MisconfigurationException, match="give the lr_scheduler dict the key 'monitor'"):
        Trainer(**options, max_epochs=1, enable_checkpointing=False).fit(Unnamed(), data)
