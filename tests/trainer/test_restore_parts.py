"""Taking some parts of a checkpoint and leaving others out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from milepost import Module, Trainer
from milepost.callbacks import ModelCheckpoint, Timer
from milepost.errors import MisconfigurationException, ResumeError


class Line(Module):
    """Notes its weight, its optimizer's step and a random number where training begins."""

    optimizer: Any = torch.optim.Adam

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.began: dict[str, Any] = {}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if not self.began:
            states = self.trainer.optimizers[0].state.values()
            self.began = {
                "step": self.trainer.global_step,
                "weight": self.layer.weight.detach().clone(),
                "moments": [float(s["step"]) for s in states if "step" in s],
                "rate": self.trainer.optimizers[0].param_groups[0]["lr"],
                "random": torch.rand(1).item(),
            }
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class OtherLine(Line):
    optimizer = torch.optim.SGD


def fit(root: Path, model: Module, *callbacks: Any, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", logger=False, max_epochs=options.pop("max_epochs", 1), default_root_dir=root,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2), **options)
    return trainer


@pytest.fixture
def saved(tmp_path: Path) -> tuple[str, Line]:
    model = Line()
    checkpointer = ModelCheckpoint(tmp_path / "c")
    fit(tmp_path, model, checkpointer)
    return checkpointer.best_model_path, model


def test_the_weights_alone_begin_a_new_run_even_under_another_optimizer(saved: Any, tmp_path: Path) -> None:
    path, trained = saved
    model = OtherLine()
    with pytest.raises(ResumeError, match="restore="):
        fit(tmp_path, OtherLine(), ckpt_path=path, max_epochs=2)
    trainer = fit(tmp_path, model, ckpt_path=path, restore="model")
    assert torch.equal(model.began["weight"], trained.layer.weight)
    assert model.began["step"] == 0 and model.began["rate"] == 0.01 and trainer.global_step == 4
    assert trainer.restored == {
        "model": "restored", "datamodule": "left out", "callbacks": "left out", "precision": "left out",
        "optimizer": "left out", "scheduler": "left out", "loops": "left out", "rng": "left out",
    }  # fmt: skip


def test_the_optimizer_may_come_along_without_the_schedule_and_the_position(saved: Any, tmp_path: Path) -> None:
    model = Line()
    fit(tmp_path, model, ckpt_path=saved[0], restore={"model", "optimizer"})
    assert model.began["moments"] == [4.0, 4.0] and model.began["step"] == 0


def test_all_but_the_random_state_goes_on_at_the_same_place(saved: Any, tmp_path: Path) -> None:
    def began(**options: Any) -> dict[str, Any]:
        model = Line()
        torch.manual_seed(99)
        fit(tmp_path, model, ckpt_path=saved[0], max_epochs=2, **options)
        return model.began

    whole = began()
    without = began(restore={"model", "callbacks", "precision", "optimizer", "scheduler", "loops"})
    assert without["step"] == whole["step"] == 4 and torch.equal(without["weight"], whole["weight"])
    assert without["rate"] == whole["rate"] == 0.005
    assert without["random"] != whole["random"]
    alone = began(restore="rng")
    assert alone["step"] == 0 and not torch.equal(alone["weight"], whole["weight"])
    assert alone["random"] == whole["random"]


def test_callbacks_may_be_left_out(saved: Any, tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "d")
    fit(tmp_path, Line(), checkpointer, ckpt_path=saved[0], restore={"model", "optimizer", "scheduler"})
    assert Path(checkpointer.best_model_path).parent.name == "d"
    assert Path(saved[0]).exists()


def test_what_the_checkpoint_lacks_is_told(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", save_weights_only=True)
    fit(tmp_path, Line(), checkpointer)
    with pytest.raises(ResumeError, match=r"restore=\{'model'\}"):
        fit(tmp_path, Line(), ckpt_path=checkpointer.best_model_path, max_epochs=2)
    trainer = fit(tmp_path, Line(), Timer(), ckpt_path=checkpointer.best_model_path, restore={"model", "rng"})
    assert trainer.restored["model"] == "restored" and trainer.restored["rng"] == "not in the checkpoint"


def test_a_whole_restore_reports_too(saved: Any, tmp_path: Path) -> None:
    trainer = fit(tmp_path, Line(), ModelCheckpoint(tmp_path / "c"), ckpt_path=saved[0], max_epochs=2)
    assert {p for p, fate in trainer.restored.items() if fate == "restored"} == {
        "model", "callbacks", "optimizer", "scheduler", "loops", "rng",
    }  # fmt: skip


@pytest.mark.parametrize("restore", [{"weights"}, [], ""])
def test_a_part_that_there_is_not_is_refused(saved: Any, tmp_path: Path, restore: Any) -> None:
    with pytest.raises(MisconfigurationException, match="restore names"):
        fit(tmp_path, Line(), ckpt_path=saved[0], restore=restore)
