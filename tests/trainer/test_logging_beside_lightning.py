"""What ``self.log`` records: every key, name, reduction and view is that of pytorch-lightning."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from beside import Record, check, fit, loader, module_of, views
from torch.utils.data import DataLoader

from milepost.errors import MisconfigurationException


def named(value: Any) -> str:
    """An identifier that is the same in every process: no address of a function in it."""
    return re.sub(r" of type object at 0x[0-9a-f]+", "", str(value))


STEP_HOOKS = (
    "on_train_batch_start", "on_train_batch_end", "on_before_backward", "backward", "on_after_backward",
    "on_before_optimizer_step", "on_before_zero_grad", "optimizer_zero_grad", "optimizer_step",
    "configure_gradient_clipping",
)  # fmt: skip
EPOCH_HOOKS = (
    "on_train_start", "on_train_epoch_start", "on_train_epoch_end", "on_validation_start",
    "on_validation_epoch_start", "on_validation_epoch_end", "on_validation_batch_start", "on_validation_batch_end",
)  # fmt: skip
SILENT_HOOKS = (
    "on_fit_start", "on_fit_end", "on_train_end", "on_validation_end", "setup", "teardown", "configure_model",
    "configure_optimizers", "lr_scheduler_step", "on_validation_model_eval", "on_before_batch_transfer",
    "on_after_batch_transfer", "transfer_batch_to_device", "on_validation_model_zero_grad", "prepare_data",
    "configure_callbacks",
)  # fmt: skip

EPOCH_ONLY = {"on_step": False, "on_epoch": True}

Build = Callable[[Any], Any]


def same(build: Build, *loaders: Any, **options: Any) -> tuple[Record, Record]:
    def case(library: Any, record: Record) -> None:
        given = loaders or (loader(), loader(3, seed=2))
        fit(library, record, build(module_of(library, record))(), *given, **options)

    return check(case)


def logging_in(hook: str, **options: Any) -> Build:
    def build(net: Any) -> Any:
        def logs(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            self.log("h", float(self.calls), **options)
            return getattr(super(made, self), hook)(*args, **kwargs)

        made: Any = type("Net", (net,), {hook: logs, "configure_optimizers": _step_scheduled})
        if hook == "configure_optimizers":
            made.configure_optimizers = logs
        return made

    return build


def _step_scheduled(module: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize(
    ("options", "accumulate"), [({}, 1), ({"on_step": True, "on_epoch": True, "prog_bar": True}, 2)], ids=named
)
@pytest.mark.parametrize("hook", STEP_HOOKS)
def test_hooks_of_a_step(hook: str, options: dict[str, Any], accumulate: int) -> None:
    ours, _ = same(logging_in(hook, **options), accumulate_grad_batches=accumulate)
    assert ours.error is None


@pytest.mark.parametrize("options", [{"on_step": True}, {"on_epoch": False}, {"prog_bar": True}], ids=named)
@pytest.mark.parametrize("hook", EPOCH_HOOKS)
def test_hooks_of_an_epoch_and_of_validation(hook: str, options: dict[str, Any]) -> None:
    same(logging_in(hook, **options))


@pytest.mark.parametrize("hook", SILENT_HOOKS)
def test_hooks_in_which_nothing_can_be_logged(hook: str) -> None:
    ours, theirs = same(logging_in(hook))
    assert ours.error is MisconfigurationException and theirs.error is not None


def logging_value(value: Callable[[int], Any], **options: Any) -> Build:
    def build(net: Any) -> Any:
        class Net(net):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.log("x", value(self.trainer.global_step), **options)
                self.note(views(self.trainer))
                return self.loss(batch)

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.log("x", value(batch_idx), **options)
                self.note(views(self.trainer))

        return Net

    return build


@pytest.mark.parametrize(
    "options",
    [
        {"on_step": True},
        {"on_epoch": True},
        {"on_step": True, "on_epoch": True},
        {"on_epoch": True, "reduce_fx": "sum"},
        {"on_epoch": True, "reduce_fx": "max"},
        {"on_epoch": True, "reduce_fx": "min"},
        {"on_epoch": True, "reduce_fx": "AVG"},
        {"on_epoch": True, "reduce_fx": torch.mean},
        {"on_epoch": True, "reduce_fx": torch.max},
        {"on_epoch": True, "reduce_fx": sum},
        {"on_epoch": True, "batch_size": 3},
        {"on_epoch": True, "batch_size": 0},
        {"on_epoch": True, "logger": False},
        {"logger": False},
        {"prog_bar": True},
        {"prog_bar": True, "on_epoch": True, "on_step": True},
        {"sync_dist": True, "on_epoch": True},
        {"rank_zero_only": True},
        {"enable_graph": True, "on_epoch": True},
        {"logger": True},
    ],
    ids=named,
)
def test_options(options: dict[str, Any]) -> None:
    ours, _ = same(logging_value(lambda step: 1.5 + step, **options))
    assert ours.error is None


@pytest.mark.parametrize(
    "value",
    [
        lambda step: step,
        lambda step: step % 2 == 0,
        lambda step: torch.tensor(step),
        lambda step: torch.tensor([2.0 * step]),
        lambda step: torch.tensor(0.1 * step, dtype=torch.bfloat16),
        lambda step: torch.tensor(0.1 * step, dtype=torch.float64),
        lambda step: float("nan"),
        lambda step: np.float64(step / 3),
        lambda step: np.float32(step / 3),
    ],
    ids=["int", "bool", "integer tensor", "one element", "bf16", "fp64", "nan", "numpy double", "numpy single"],
)
def test_values(value: Callable[[int], Any]) -> None:
    ours, _ = same(logging_value(value, on_step=True, on_epoch=True, reduce_fx="sum"))
    assert ours.error is None


@pytest.mark.parametrize("value", ["text", None, torch.ones(2), {"a": 1.0}, [1.0]], ids=named)
def test_both_refuse_values(value: Any) -> None:
    ours, theirs = same(logging_value(lambda step: value))
    assert ours.error is not None and issubclass(ours.error, ValueError) and theirs.error is not None


@pytest.mark.parametrize(
    "options",
    [{"on_step": False, "on_epoch": False}, {"reduce_fx": "median"}, {"reduce_fx": torch.median, "on_epoch": True}],
    ids=["nothing", "text", "function"],
)
def test_both_refuse_options(options: dict[str, Any]) -> None:
    ours, theirs = same(logging_value(float, **options))
    assert ours.error is MisconfigurationException and theirs.error is not None


@pytest.mark.parametrize("again", [{"on_epoch": True}, {"on_epoch": False}], ids=named)
def test_one_key_logged_twice(again: dict[str, Any]) -> None:
    def build(net: Any) -> Any:
        class Net(net):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.log("x", 1.0, on_epoch=True)
                self.log("x", 3.0, **again)
                return self.loss(batch)

        return Net

    ours, _ = same(build)
    assert (ours.error is not None) == (not again["on_epoch"])


def test_a_key_that_only_some_batches_log() -> None:
    """Loggers get its last value: with log_every_n_steps=2 the batches that log may never be those that are sent."""

    def build(net: Any) -> Any:
        class Net(net):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                if batch_idx % 2 == 0:
                    self.log("x", float(batch_idx), on_step=True)
                if batch_idx % 3 == 1:
                    self.log("y", float(batch_idx), on_step=True, on_epoch=True)
                self.note(views(self.trainer))
                return self.loss(batch)

        return Net

    ours, _ = same(build)
    assert any("x" in values for _, values in ours.logged)


def test_a_logged_step_is_the_loggers_step() -> None:
    def build(net: Any) -> Any:
        class Net(net):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.log("step", 100.0 + batch_idx)
                self.log("epoch", 7.0)
                return self.loss(batch)

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.log("step", 50.0)
                self.log("v", 1.0)

        return Net

    ours, _ = same(build)
    assert (101, {"epoch": 7.0}) in ours.logged


def test_log_dict_and_what_callbacks_log() -> None:
    def case(library: Any, record: Record) -> None:
        class Logs(library.Callback):  # type: ignore[misc]
            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
                module.log("batch", 1.0 * batch_idx)

            def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
                module.log("validation", 5.0)

            def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
                module.log("epoch", 6.0)

        class Net(module_of(library, record)):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                options = {"on_step": True, "on_epoch": True, "prog_bar": True}
                self.log_dict({"a": 1.0, "b": torch.tensor(2.0)}, **options)
                return self.loss(batch)

            def on_train_epoch_end(self) -> None:
                self.log("mine", 1.0)
                super().on_train_epoch_end()

        fit(library, record, Net(), loader(), loader(3, seed=2), callbacks=[Logs()])

    check(case)


def test_the_views_at_every_moment() -> None:
    def build(net: Any) -> Any:
        def reads(name: str) -> Any:
            def hook(self: Any, *args: Any) -> Any:
                if name == "on_train_start":
                    self.log("start", 3.0)
                self.note(name, views(self.trainer))
                return getattr(super(Net, self), name)(*args)

            return hook

        class Logging(net):  # type: ignore[misc]
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.log("s", float(batch_idx), on_step=True, on_epoch=True)
                self.log("p", float(batch_idx), on_step=True, on_epoch=False, prog_bar=True)
                self.note(views(self.trainer))

        names = ("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_validation_start")
        names += ("on_validation_end", "on_train_end", "on_after_backward")
        Net: Any = type("Net", (Logging,), {name: reads(name) for name in names})
        return Net

    same(build, val_check_interval=2)


@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 1}, {"limit_val_batches": 0.5}], ids=named)
def test_several_validation_loaders(options: dict[str, Any]) -> None:
    def build(net: Any) -> Any:
        class Net(net):  # type: ignore[misc]
            def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
                loss = self.loss(batch)
                self.note("val", batch_idx, dataloader_idx, loss)
                self.log("v", loss, on_step=True, on_epoch=True, prog_bar=True)
                self.log(f"own{dataloader_idx}", 2.0, add_dataloader_idx=False)
                self.note(views(self.trainer))

            def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
                self.log("end", 1.0 * batch_idx)

            def on_validation_epoch_end(self) -> None:
                self.log("late", 1.0)
                super().on_validation_epoch_end()

        return Net

    ours, _ = same(build, loader(), [loader(2), loader(3, seed=4)], num_sanity_val_steps=0, **options)
    assert "v_epoch/dataloader_idx_1" in ours.left["callback_metrics"]


@pytest.mark.parametrize("name", ["v/dataloader_idx_0", "own"])
def test_both_refuse_names_of_several_loaders(name: str) -> None:
    def build(net: Any) -> Any:
        class Net(net):  # type: ignore[misc]
            def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
                self.log(name, 1.0, add_dataloader_idx=name != "own")

        return Net

    ours, theirs = same(build, loader(), [loader(2), loader(3, seed=4)])
    assert ours.error is MisconfigurationException and theirs.error is not None


@pytest.mark.parametrize(
    "options", [{}, {"on_step": True, "on_epoch": True}, {"on_step": False, "on_epoch": True}], ids=named
)
def test_torchmetrics(options: dict[str, Any]) -> None:
    def build(net: Any) -> Any:
        class Net(net):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.seen = torchmetrics.MeanSquaredError()
                self.updated = torchmetrics.MeanSquaredError()
                self.by_hand = torchmetrics.MeanSquaredError()
                self.several = torchmetrics.MetricCollection(
                    {
                        "mse": torchmetrics.MeanSquaredError(),
                        "mae": torchmetrics.MeanAbsoluteError(),
                        "rmse": torchmetrics.MeanSquaredError(squared=False),
                    }
                )

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                predicted = self.layer(batch[0])
                self.seen(predicted, batch[1])
                self.log("seen", self.seen, **options)
                self.by_hand.update(predicted, batch[1])
                self.note(views(self.trainer))
                return self.loss(batch)

            def on_train_epoch_end(self) -> None:
                self.log("by_hand", self.by_hand.compute())
                self.by_hand.reset()
                super().on_train_epoch_end()

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                predicted = self.layer(batch[0])
                self.updated.update(predicted, batch[1])
                self.log("updated", self.updated, metric_attribute="updated", **options)
                self.several(predicted, batch[1])
                self.log_dict(self.several, **options)

        return Net

    ours, _ = same(build)
    assert ours.error is None


class Named(torch.utils.data.Dataset[Any]):
    def __init__(self, form: str) -> None:
        self.form = form

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Any:
        x = torch.full((2, 3), float(index))
        return {"dict": {"x": x, "y": x}, "nested": [("s", {"x": x}), x], "text first": {"name": "a", "x": x}}[
            self.form
        ]


@pytest.mark.parametrize("form", ["dict", "nested", "text first"])
def test_the_size_of_a_batch_is_read_off_it(form: str) -> None:
    def build(net: Any) -> Any:
        class Net(net):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.log("i", float(batch_idx), on_epoch=True)
                return self.layer(torch.ones(4, 3)).sum()

        return Net

    ours, _ = same(build, DataLoader(Named(form), batch_size=3))
    assert ours.left["callback_metrics"]["i"] == pytest.approx((3 * 0 + 3 * 1 + 1 * 2) / 7)


def test_a_step_called_by_hand_logs_nothing() -> None:
    import milepost

    record = Record()
    net = module_of(milepost, record)()
    trainer = fit(milepost, record, net, loader(), max_epochs=1)
    before = dict(trainer.callback_metrics)
    net.validation_step(next(iter(loader())), 0)
    assert trainer.callback_metrics == before
