"""The same runs under Lightning leave the same files, and it takes up our state."""

from __future__ import annotations

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from line_run import fit_line, loader, names

from milepost.callbacks import ModelCheckpoint

lightning = pytest.importorskip("pytorch_lightning")

VALUES = [0.5, 0.9, 0.3, 0.4]


def _theirs(root: Path, checkpointer: Any, **options: Any) -> None:
    class Line(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)
            self.validations = 0

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.layer(batch[0]).pow(2).mean()
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def on_validation_epoch_end(self) -> None:
            self.log("val", VALUES[self.validations])
            self.validations += 1

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=0, default_root_dir=root, callbacks=[checkpointer], **options,
        )  # fmt: skip
        torch.manual_seed(0)
        trainer.fit(Line(), loader(), loader())


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, {"max_epochs": 3}),
        ({"save_top_k": -1}, {"max_epochs": 3}),
        ({"filename": "{epoch}-{val:.2f}", "monitor": "val", "save_top_k": 2}, {"max_epochs": 4}),
        ({"filename": "{epoch:03d}", "monitor": "val", "mode": "max"}, {"max_epochs": 4}),
        ({"filename": "m-{epoch}-{val}", "auto_insert_metric_name": False}, {"max_epochs": 2}),
        ({"filename": "same", "monitor": "val", "save_top_k": 3}, {"max_epochs": 4}),
        ({"save_last": True}, {"max_epochs": 2}),
        ({"save_last": "link"}, {"max_epochs": 2}),
        ({"every_n_train_steps": 3, "save_top_k": -1}, {"max_epochs": 3}),
        ({"every_n_epochs": 2, "save_top_k": -1}, {"max_epochs": 4}),
        ({"save_top_k": -1}, {"max_epochs": 2, "val_check_interval": 0.5}),
        ({"save_top_k": -1}, {"max_epochs": 4, "check_val_every_n_epoch": 2}),
        ({"save_on_train_epoch_end": False, "every_n_epochs": 2}, {"max_epochs": 4}),
        ({"save_top_k": 0, "save_last": True}, {"max_epochs": 2}),
        ({"save_top_k": -1, "save_on_train_epoch_end": True}, {"max_epochs": 2, "val_check_interval": 0.5}),
        ({"save_top_k": -1, "save_on_train_epoch_end": False}, {"max_epochs": 2, "val_check_interval": 0.5}),
        ({"save_top_k": -1, "train_time_interval": timedelta(0)}, {"max_epochs": 1}),
        ({"train_time_interval": timedelta(hours=1), "save_last": True}, {"max_epochs": 1}),
        ({"filename": "same", "enable_version_counter": False, "save_top_k": -1}, {"max_epochs": 3}),
        ({"monitor": "train_loss", "every_n_train_steps": 2, "save_top_k": 2, "filename": "{step}"}, {"max_epochs": 2}),
        ({"monitor": "step", "mode": "max", "save_top_k": 2}, {"max_epochs": 3}),
        ({"save_weights_only": True, "save_top_k": -1}, {"max_epochs": 2}),
        ({"every_n_train_steps": 1, "save_top_k": -1}, {"max_epochs": 1, "accumulate_grad_batches": 2}),
        ({"every_n_train_steps": 0}, {"max_epochs": 1}),
        ({"every_n_epochs": 0, "save_last": True}, {"max_epochs": 1}),
        ({"save_top_k": -1}, {"max_epochs": 3, "limit_val_batches": 0}),
        ({"save_top_k": -1}, {"max_epochs": 5, "max_steps": 6}),
    ],
)
def test_the_same_files(tmp_path: Path, arguments: dict[str, Any], options: dict[str, Any]) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint as Theirs

    reference = Theirs(tmp_path / "theirs", **arguments)
    _theirs(tmp_path, reference, **options)
    ours = ModelCheckpoint(tmp_path / "ours", **arguments)
    fit_line(tmp_path, ours, values=VALUES, **options)
    theirs = names(tmp_path / "theirs") if (tmp_path / "theirs").exists() else set()
    assert (names(tmp_path / "ours") if (tmp_path / "ours").exists() else set()) == theirs
    for attribute in ("best_model_path", "kth_best_model_path"):
        assert Path(getattr(ours, attribute)).name == Path(getattr(reference, attribute)).name, attribute
    assert ours.best_model_score == reference.best_model_score


def test_lightning_takes_up_our_state(tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint as Theirs

    arguments: dict[str, Any] = {"dirpath": tmp_path / "c", "monitor": "val", "save_top_k": 2, "save_last": True}
    ours = ModelCheckpoint(**arguments)
    fit_line(tmp_path, ours, values=VALUES, max_epochs=3)
    theirs = Theirs(**arguments)
    theirs.load_state_dict(ours.state_dict())
    for name in ("best_model_path", "best_k_models", "kth_best_model_path", "kth_value", "last_model_path"):
        assert getattr(theirs, name) == getattr(ours, name), name


@pytest.mark.parametrize(
    ("template", "arguments"),
    [
        ("{epoch}-{step}", {}),
        ("{epoch:03d}-{val:.3f}", {}),
        ("{val}", {"ver": 2}),
        ("m={epoch}", {"prefix": "p"}),
        (None, {}),
        (None, {"ver": 0, "prefix": "exception"}),
        ("plain", {"ver": 1}),
    ],
)
@pytest.mark.parametrize("insert", [True, False])
@pytest.mark.parametrize(
    "constants", [{}, {"CHECKPOINT_JOIN_CHAR": "_", "CHECKPOINT_EQUALS_CHAR": "~", "FILE_EXTENSION": ".pt"}]
)
def test_the_same_names(
    template: str | None, arguments: dict[str, Any], insert: bool, constants: dict[str, str]
) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint as Theirs

    made = []
    for cls in (ModelCheckpoint, Theirs):
        checkpointer = cls(filename=template, auto_insert_metric_name=insert)
        for name, value in constants.items():
            setattr(checkpointer, name, value)
        made.append(
            checkpointer.format_checkpoint_name({"epoch": 1, "step": 9, "val": torch.tensor(0.25)}, **arguments)
        )
    assert made[0] == made[1]


@pytest.mark.parametrize("value", [0.1, 0.3, 0.9, float("nan"), float("inf"), None])
def test_the_same_verdict_on_a_value(tmp_path: Path, value: float | None) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint as Theirs

    arguments: dict[str, Any] = {"dirpath": tmp_path / "c", "monitor": "val", "save_top_k": 2}
    ours = ModelCheckpoint(**arguments)
    trainer = fit_line(tmp_path, ours, values=VALUES, max_epochs=3)
    theirs = Theirs(**arguments)
    theirs.load_state_dict(ours.state_dict())
    current = None if value is None else torch.tensor(value)

    class OneRank:
        class strategy:
            reduce_boolean_decision = staticmethod(lambda decision: decision)

    assert bool(ours.check_monitor_top_k(trainer, current)) == bool(theirs.check_monitor_top_k(OneRank, current))  # type: ignore[arg-type]
