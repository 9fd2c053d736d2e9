"""Parts that a hook holds in eval mode are held in the resumed run too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from milepost import LightningModule, Trainer
from milepost.callbacks import ModelCheckpoint


class Still(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.net = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(3, 1))
        self.modes: list[tuple[int, bool, bool]] = []

    def on_train_epoch_start(self) -> None:
        self.norm.eval()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.modes.append((self.global_step, self.norm.training, self.net.training))
        loss: torch.Tensor = self.net(self.norm(batch[0])).square().mean()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("held", self.net(self.norm(batch[0])).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ByItsHook(Still):
    """Trains its normalisation from the first validation on."""

    def on_validation_model_train(self) -> None:
        self.train()


def fit(module: Still, place: Path, ckpt_path: Path | None = None, **saves: Any) -> Still:
    rows = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(rows), batch_size=2)
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        val_check_interval=3, num_sanity_val_steps=0,
        callbacks=ModelCheckpoint(place, "{step}", save_top_k=-1, **saves),
    )  # fmt: skip
    trainer.fit(module, loader, loader, ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return module


@pytest.mark.parametrize("kind", [Still, ByItsHook])
@pytest.mark.parametrize(("step", "saves"), [(2, {"every_n_train_steps": 1}), (3, {"monitor": "held"})])
def test_modes_go_on(kind: type[Still], step: int, saves: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = fit(kind(), tmp_path, **saves)
    assert {norm for _, norm, _ in whole.modes} == ({False} if kind is Still else {False, True})
    resumed = fit(kind(), tmp_path, tmp_path / f"step={step}.ckpt", **saves)
    assert resumed.modes == whole.modes[step:]
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in whole.state_dict().items())
