"""Averaged checkpoints are those of Lightning, bit for bit, and each resumes the other's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import milepost
import milepost.callbacks

pl = pytest.importorskip("pytorch_lightning")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the other library


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(24, 4, generator=generator), torch.randn(24, 1, generator=generator))
    return DataLoader(data, batch_size=4)


def fit(library: Any, folder: Path, epochs: int, resume: str | None = None) -> dict[str, Any]:
    """Train with `library` and return its last checkpoint."""

    class Net(library.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return (self.layer(batch[0]) - batch[1]).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", (self.layer(batch[0]) - batch[1]).square().mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    torch.manual_seed(0)
    callbacks = library.callbacks
    trainer = library.Trainer(
        max_epochs=epochs,
        callbacks=[
            callbacks.EMAWeightAveraging(decay=0.8, update_every_n_steps=2),
            callbacks.EarlyStopping("val", patience=9),
            callbacks.ModelCheckpoint(folder, save_last=True),
        ],
        logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    options = {"weights_only": False} if library is pl else {}
    trainer.fit(Net(), loader(), loader(), ckpt_path=resume, **options)
    checkpoint: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=False)
    return checkpoint


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert set(a[part]) == set(b[part])
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part]), part
    assert a["callbacks"]["EMAWeightAveraging"] == b["callbacks"]["EMAWeightAveraging"]
    stopping = "EarlyStopping{'monitor': 'val', 'mode': 'min'}"
    ours = b["callbacks"][stopping]
    assert {key: a["callbacks"][stopping][key] for key in ours} == ours


def test_same_checkpoints_and_each_resumes_the_other(tmp_path: Path) -> None:
    assert_same(fit(pl, tmp_path / "pl", 2), fit(milepost, tmp_path / "mp", 2))
    whole = fit(milepost, tmp_path / "whole", 4)
    assert_same(fit(pl, tmp_path / "pl2", 4, str(tmp_path / "mp" / "last.ckpt")), whole)
    assert_same(fit(pl, tmp_path / "pl3", 4, str(tmp_path / "pl" / "last.ckpt")), whole)
    assert_same(whole, fit(milepost, tmp_path / "mp2", 4, str(tmp_path / "pl" / "last.ckpt")))
