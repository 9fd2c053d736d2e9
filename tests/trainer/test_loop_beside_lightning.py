"""The fit loop does what pytorch-lightning's does: each batch, validation, step, learning rate, metric and weight."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from beside import SETTINGS, Flow, Record, check, fit, loader, module_of, run
from torch.utils.data import DataLoader, TensorDataset

from milepost.errors import MisconfigurationException


def flow() -> DataLoader[Any]:
    return DataLoader(Flow(), batch_size=4)


def plain_fit(
    options: dict[str, Any],
    train: Callable[[], Any] = loader,
    validation: Callable[[], Any] | None = lambda: loader(3, seed=2),
) -> Callable[[Any, Record], None]:
    def case(library: Any, record: Record) -> None:
        loaders = [train()] + ([validation()] if validation else [])
        fit(library, record, module_of(library, record)(), *loaders, **options)

    return case


OPTIONS: list[dict[str, Any]] = [
    {},
    {"accumulate_grad_batches": 2},
    {"accumulate_grad_batches": 4},
    {"accumulate_grad_batches": 10},
    {"accumulate_grad_batches": 2, "log_every_n_steps": 3},
    {"gradient_clip_val": 0.1},
    {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    {"gradient_clip_val": 0.0},
    {"max_steps": 5},
    {"max_steps": 15, "max_epochs": -1},
    {"max_steps": 0},
    {"max_epochs": 0},
    {"max_steps": 4, "accumulate_grad_batches": 4, "max_epochs": 5},
    {"min_epochs": 3},
    {"max_time": "00:00:00:00", "max_epochs": None},
    {"max_time": "00:00:00:00", "min_epochs": 1},
    {"max_time": {"seconds": 0}, "min_steps": 9, "max_epochs": 4},
    {"limit_train_batches": 0},
    {"limit_train_batches": 0.0},
    {"limit_train_batches": 1},
    {"limit_train_batches": 1.0},
    {"limit_train_batches": 2.0},
    {"limit_train_batches": 0.5},
    {"limit_train_batches": 100},
    {"limit_val_batches": 0},
    {"limit_val_batches": 0.0},
    {"limit_val_batches": 1},
    {"limit_val_batches": 0.5},
    {"val_check_interval": 1},
    {"val_check_interval": 2},
    {"val_check_interval": 4},
    {"val_check_interval": 2.0},
    {"val_check_interval": 0.5},
    {"val_check_interval": 0.3},
    {"val_check_interval": 0.1},
    {"val_check_interval": 7, "limit_val_batches": 0},
    {"val_check_interval": 4, "check_val_every_n_epoch": None},
    {"val_check_interval": 8, "check_val_every_n_epoch": None},
    {"check_val_every_n_epoch": None},
    {"val_check_interval": timedelta(seconds=0)},
    {"val_check_interval": timedelta(days=1)},
    {"val_check_interval": {"seconds": 0}, "check_val_every_n_epoch": None},
    {"val_check_interval": "00:01:00:00", "check_val_every_n_epoch": None},
    {"check_val_every_n_epoch": 2, "max_epochs": 5},
    {"check_val_every_n_epoch": 2, "max_epochs": 4, "val_check_interval": 2},
    {"num_sanity_val_steps": 0},
    {"num_sanity_val_steps": 1},
    {"num_sanity_val_steps": -1},
    {"num_sanity_val_steps": 9},
    {"fast_dev_run": 1},
    {"fast_dev_run": True},
    {"fast_dev_run": 3},
    {"fast_dev_run": 3, "val_check_interval": 1, "accumulate_grad_batches": 2, "max_epochs": 9, "max_steps": 1},
    {"overfit_batches": 1},
    {"overfit_batches": 2},
    {"overfit_batches": 0.5},
    {"overfit_batches": 2, "fast_dev_run": 1},
    {"reload_dataloaders_every_n_epochs": 1},
    {"deterministic": True},
    {"log_every_n_steps": 0},
    {"log_every_n_steps": 1},
    {"log_every_n_steps": 3},
    {"log_every_n_steps": None},
    {"logger": False},
    {"detect_anomaly": True},
    {"inference_mode": False},
    {
        "barebones": True, "logger": None, "log_every_n_steps": None, "enable_checkpointing": None,
        "enable_progress_bar": None, "enable_model_summary": None,
    },
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_run(options: dict[str, Any]) -> None:
    try:
        ours, _ = check(plain_fit(options))
    finally:
        torch.use_deterministic_algorithms(False)
    assert ours.error is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 4},
        {"limit_train_batches": 2},
        {"limit_train_batches": 2, "check_val_every_n_epoch": None},
        {"val_check_interval": 2},
        {"val_check_interval": 1},
        {"val_check_interval": 1.0},
        {"val_check_interval": 4, "check_val_every_n_epoch": None},
        {"val_check_interval": "00:00:00:00"},
        {"limit_val_batches": 2},
    ],
    ids=str,
)
def test_same_run_where_the_length_is_unknown(options: dict[str, Any]) -> None:
    ours, _ = check(plain_fit(options, flow, flow))
    assert ours.error is None


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}, {"accumulate_grad_batches": 4}], ids=str)
def test_same_run_without_validation(options: dict[str, Any]) -> None:
    check(plain_fit(options, validation=None))


def test_no_batches_is_no_training() -> None:
    ours, _ = check(plain_fit({}, lambda: DataLoader(TensorDataset(torch.zeros(0, 3), torch.zeros(0, 1)))))
    assert not any(event[0] == "train" for event in ours.events)


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 0.1},
        {"limit_train_batches": -1},
        {"limit_train_batches": 1.5},
        {"limit_val_batches": 0.1},
        {"val_check_interval": 7},
        {"val_check_interval": 0},
        {"val_check_interval": 0.5, "check_val_every_n_epoch": None},
        {"check_val_every_n_epoch": 0.5},
        {"fast_dev_run": -1},
        {"barebones": True},
        {"gradient_clip_algorithm": "clamp"},
        {"precision": "8-mixed"},
    ],
    ids=str,
)
def test_both_refuse(options: dict[str, Any]) -> None:
    ours, theirs = check(plain_fit(options))
    assert ours.error is not None and theirs.error is not None
    assert issubclass(ours.error, ValueError)


@pytest.mark.parametrize(
    "options", [{"limit_train_batches": 0.5}, {"limit_val_batches": 0.5}, {"val_check_interval": 0.5}], ids=str
)
def test_both_refuse_a_fraction_of_an_unknown_length(options: dict[str, Any]) -> None:
    ours, _ = check(plain_fit(options, flow, flow))
    assert ours.error is MisconfigurationException


READ = (
    "max_steps", "min_steps", "accumulate_grad_batches", "limit_train_batches", "limit_val_batches",
    "limit_test_batches", "limit_predict_batches", "overfit_batches", "val_check_interval", "check_val_every_n_epoch",
    "log_every_n_steps", "fast_dev_run", "gradient_clip_val", "reload_dataloaders_every_n_epochs", "global_step",
    "current_epoch", "is_last_batch", "should_stop", "num_training_batches", "num_val_batches", "num_test_batches",
    "num_sanity_val_batches", "train_dataloader", "val_dataloaders", "world_size", "global_rank", "local_rank",
    "num_devices", "device_ids", "num_nodes", "node_rank", "is_global_zero", "training", "testing", "validating",
    "predicting", "sanity_checking", "evaluating", "interrupted", "precision", "barebones", "received_sigterm",
    "ckpt_path", "model", "lightning_module", "optimizers", "lr_scheduler_configs", "early_stopping_callback",
    "progress_bar_callback", "checkpoint_callback",
)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_steps": 5, "min_steps": 3, "precision": 64, "gradient_clip_val": 1},
        {"fast_dev_run": True},
        {"overfit_batches": 3},
        {"limit_train_batches": 2.0, "limit_val_batches": 0.5},
    ],
    ids=str,
)
def test_a_new_trainer_reads_the_same(options: dict[str, Any]) -> None:
    def case(library: Any, record: Record) -> None:
        trainer = library.Trainer(**SETTINGS, **options)
        record.left = {name: getattr(trainer, name) for name in READ}

    ours, _ = check(case)
    assert ours.error is None


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_both_refuse_a_module_without_a_step(stage: str) -> None:
    def case(library: Any, record: Record) -> None:
        getattr(library.Trainer(**SETTINGS, logger=False), stage)(library.LightningModule(), loader())

    ours, theirs = check(case)
    assert ours.error is MisconfigurationException and theirs.error is not None


@pytest.mark.parametrize("options", [{"min_steps": 1}, {"min_steps": 4}, {"min_epochs": 1}, {"min_epochs": 0}], ids=str)
def test_a_stop_inside_the_first_epoch(options: dict[str, Any]) -> None:
    def case(library: Any, record: Record) -> None:
        class Net(module_of(library, record)):  # type: ignore[misc]
            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                self.trainer.should_stop |= self.global_step == 2

        fit(library, record, Net(), loader(), loader(3), **options)

    check(case)


def test_a_difference_would_be_found() -> None:
    """The harness itself: another learning rate shows in events, metrics and weights."""

    def case(library: Any, record: Record, rate: float = 0.05) -> None:
        class Net(module_of(library, record)):  # type: ignore[misc]
            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.05 if library.__name__ == "milepost" else 0.051)

        fit(library, record, Net(), loader(), loader(3, seed=2))

    with pytest.raises(AssertionError, match=r"events\[(.|\n)*callback_metrics(.|\n)*weights"):
        check(case)
    assert run(plain_fit({}), "milepost").events == run(plain_fit({}), "milepost").events
