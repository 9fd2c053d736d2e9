"""DataModule: built of datasets, of a checkpoint, and told of errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from milepost import DataModule, Module, Trainer

POINTS = TensorDataset(torch.arange(12.0).reshape(6, 2))


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.ones(4, 2))


class Sized(DataModule):
    def __init__(self, batch_size: int = 1, name: str = "x") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.counted = 0

    def state_dict(self) -> dict[str, Any]:
        return {"counted": self.counted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counted = state_dict["counted"]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(POINTS, batch_size=self.hparams["batch_size"])


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def quiet(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        max_epochs=1, logger=False, accelerator="cpu", default_root_dir=folder, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def test_of_datasets(tmp_path: Path) -> None:
    data = DataModule.from_datasets(POINTS, [POINTS, POINTS], predict_dataset={"a": Stream()}, batch_size=2)
    assert isinstance(data.train_dataloader().sampler, RandomSampler)
    assert [len(loader) for loader in data.val_dataloader()] == [3, 3]
    assert len(list(data.predict_dataloader()["a"])) == 2
    with pytest.raises(NotImplementedError, match="test_dataloader"):
        data.test_dataloader()
    trainer = quiet(tmp_path)
    trainer.fit(Net(), datamodule=data)
    assert trainer.global_step == 3


def test_of_datasets_the_constructor_gets_what_it_takes() -> None:
    data = Sized.from_datasets(POINTS, batch_size=3, num_workers=0, name="mine")
    assert data.hparams == {"batch_size": 3, "name": "mine"}


def test_from_a_checkpoint(tmp_path: Path) -> None:
    data, trainer = Sized(batch_size=3), quiet(tmp_path)
    data.counted = 5
    trainer.fit(Net(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt").result()
    again = Sized.load_from_checkpoint(tmp_path / "a.ckpt", name="other")
    assert (again.counted, again.hparams) == (5, {"batch_size": 3, "name": "other"})
