"""Files go both ways: Lightning's resume here, ours resume there, with weights, optimizer, scheduler and loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import milepost
from milepost.callbacks import ModelCheckpoint

pl = pytest.importorskip("pytorch_lightning")
pytestmark = [pytest.mark.filterwarnings("ignore")]  # Lightning's own warnings are none of ours


def build(base: type) -> Any:
    """The same small regression job on either side's module class; nothing in it is random."""

    class Line(base):  # type: ignore[misc]
        def __init__(self, width: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = torch.nn.Linear(width, 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = (self.net(batch[0]) - batch[1]).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    torch.manual_seed(3)
    return Line()


def loader() -> DataLoader[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(24, 4, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=4)


def fit(side: Any, checkpointer: type, directory: Path, epochs: int, ckpt_path: Path | None = None) -> tuple[Any, Any]:
    saves = checkpointer(dirpath=directory, save_last=True, save_top_k=1, monitor="loss")
    trainer = side.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        callbacks=[saves],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = build(side.LightningModule)
    trainer.fit(model, loader(), ckpt_path=ckpt_path)
    return trainer, model


SIDES = {"milepost": (milepost, ModelCheckpoint), "lightning": (pl, pl.callbacks.ModelCheckpoint)}


@pytest.mark.parametrize(("writer", "reader"), [("lightning", "milepost"), ("milepost", "lightning")])
def test_a_file_of_one_is_resumed_by_the_other_to_the_same_weights(writer: str, reader: str, tmp_path: Path) -> None:
    fit(*SIDES[writer], tmp_path / "first", epochs=2)
    trainer, resumed = fit(*SIDES[reader], tmp_path / "second", epochs=4, ckpt_path=tmp_path / "first/last.ckpt")
    _, unbroken = fit(*SIDES[reader], tmp_path / "unbroken", epochs=4)
    assert trainer.global_step == 24
    assert trainer.current_epoch == 4
    assert trainer.lr_scheduler_configs[0].scheduler.get_last_lr() == [0.05 * 0.5**4]
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize(("writer", "reader"), [("lightning", "milepost"), ("milepost", "lightning")])
def test_hyperparameters_and_weights_load_from_the_others_file(writer: str, reader: str, tmp_path: Path) -> None:
    _, trained = fit(*SIDES[writer], tmp_path, epochs=1)
    module = type(build(SIDES[reader][0].LightningModule))
    loaded = module.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.hparams["width"] == 4
    assert torch.equal(loaded.net.weight, trained.net.weight)
