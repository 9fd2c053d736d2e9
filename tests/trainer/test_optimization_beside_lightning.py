"""Optimizers, schedulers and manual optimization move the weights as pytorch-lightning moves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside import Record, check, fit, loader, module_of
from torch.optim import SGD, Optimizer, lr_scheduler

from milepost.errors import MisconfigurationException

Build = Callable[[Any], Any]  # from the library's module to the one that is trained


def same(build: Build, *, validate: bool = True, **options: Any) -> tuple[Record, Record]:
    def case(library: Any, record: Record) -> None:
        loaders = [loader(), loader(3, seed=2)] if validate else [loader()]
        fit(library, record, build(module_of(library, record))(), *loaders, **options)

    return check(case)


def configured(configure: Callable[[Any], Any]) -> Build:
    def build(net: Any) -> Any:
        class Net(net):  # type: ignore[misc]
            def configure_optimizers(self) -> Any:
                return configure(self)

        return Net

    return build


def halving(optimizer: Optimizer) -> Any:
    return lr_scheduler.StepLR(optimizer, 1, 0.5)


def impatient(optimizer: Optimizer) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=10.0)


def one_cycle(module: Any) -> Any:
    optimizer = SGD(module.parameters(), lr=0.1)
    steps = module.trainer.estimated_stepping_batches
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def scheduled(make: Callable[[Optimizer], Any], **config: Any) -> Build:
    def configure(module: Any) -> Any:
        optimizer = SGD(module.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **config}}

    return configured(configure)


def warm_up(optimizer: Optimizer) -> Any:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])


def lists(module: Any) -> Any:
    optimizer = SGD(module.parameters(), lr=0.1)
    return [optimizer], [{"scheduler": halving(optimizer), "interval": "step"}, warm_up(optimizer)]


def tuples(module: Any) -> Any:
    optimizer = SGD(module.parameters(), lr=0.1)
    return [optimizer], halving(optimizer)


def plain_plateau(module: Any) -> Any:
    optimizer = SGD(module.parameters(), lr=0.1)
    return {"optimizer": optimizer, "lr_scheduler": impatient(optimizer), "monitor": "val_loss"}


@pytest.mark.parametrize("configure", [lambda m: [SGD(m.parameters(), lr=0.1)], lists, tuples, plain_plateau])
def test_forms_of_configure_optimizers(configure: Callable[[Any], Any]) -> None:
    same(configured(configure), max_epochs=3)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"interval": "epoch"}, {"max_epochs": 3}),
        ({"interval": "epoch", "frequency": 2}, {"max_epochs": 4}),
        ({"interval": "step"}, {}),
        ({"interval": "step", "frequency": 2}, {}),
        ({"interval": "step"}, {"accumulate_grad_batches": 4}),
        ({"interval": "step", "frequency": 2}, {"accumulate_grad_batches": 2}),
        ({"interval": "step", "frequency": 3}, {"accumulate_grad_batches": 4}),
        ({}, {"max_steps": 8, "max_epochs": -1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [halving, warm_up])
def test_schedulers(make: Callable[[Optimizer], Any], config: dict[str, Any], options: dict[str, Any]) -> None:
    ours, _ = same(scheduled(make, **config), **options)
    rates = [event[4] for event in ours.events if event[0] == "end"]
    assert rates[0] != rates[-1] or make is warm_up


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"monitor": "val_loss"}, {"max_epochs": 4}),
        ({"monitor": "val_loss", "frequency": 2}, {"max_epochs": 4}),
        ({"monitor": "train_loss"}, {"max_epochs": 4}),
        ({"monitor": "train_loss_epoch"}, {"max_epochs": 4}),
        ({"monitor": "train_loss"}, {"max_steps": 8, "max_epochs": -1}),
        ({"monitor": "train_loss", "interval": "step", "frequency": 2}, {}),
        ({"monitor": "val_loss", "interval": "step", "frequency": 2}, {"val_check_interval": 2}),
        ({"monitor": "unknown", "strict": False}, {}),
    ],
    ids=str,
)
def test_plateau_schedulers(config: dict[str, Any], options: dict[str, Any]) -> None:
    ours, _ = same(scheduled(impatient, **config), **options)
    rates = [event[4] for event in ours.events if event[0] == "end"]
    assert (rates[0] != rates[-1]) == (config["monitor"] != "unknown")


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 4}, {"max_steps": 5}, {"limit_train_batches": 0.5}], ids=str
)
def test_one_cycle_over_the_estimated_steps(options: dict[str, Any]) -> None:
    same(configured(one_cycle), **options)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3), {}),
        (lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3), {"gradient_clip_val": 0.1}),
        (lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3), {"accumulate_grad_batches": 2}),
        (lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3), {"precision": "bf16-mixed"}),
        (lambda m: torch.optim.AdamW(m.parameters(), lr=0.1), {}),
        (lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, fused=True), {"gradient_clip_val": 0.1}),
    ],
)
def test_optimizers(make: Callable[[Any], Any], options: dict[str, Any]) -> None:
    same(configured(make), **options)


@pytest.mark.parametrize(
    "build",
    [
        scheduled(impatient, monitor="unknown"),
        scheduled(impatient),
        scheduled(halving, interval="batch"),
        configured(lambda m: [SGD(m.parameters(), lr=0.1), SGD(m.parameters(), lr=0.1)]),
        configured(lambda m: ([SGD(m.parameters(), lr=0.1)], [halving(SGD(m.parameters(), lr=0.1))])),
        configured(lambda m: 5),
    ],
)
def test_both_refuse(build: Build) -> None:
    ours, theirs = same(build)
    assert ours.error is MisconfigurationException and theirs.error is not None


@pytest.mark.parametrize("key", ["in_the_scheduler", "beside_the_optimizer"])
def test_unknown_keys_are_warned_of(key: str) -> None:
    def configure(module: Any) -> Any:
        optimizer = SGD(module.parameters(), lr=0.1)
        extra = {"foo": 1}
        scheduler = {"scheduler": halving(optimizer), **(extra if key == "in_the_scheduler" else {})}
        return {"optimizer": optimizer, "lr_scheduler": scheduler, **(extra if key != "in_the_scheduler" else {})}

    same(configured(configure))
    with pytest.warns(UserWarning, match="'foo', which means nothing there"):
        import milepost
        from milepost.trainer.optimization import parse_optimizers

        module = milepost.Module()
        module.weight = torch.nn.Parameter(torch.zeros(1))
        parse_optimizers(configure(module))


def test_without_an_optimizer_batches_count_as_steps() -> None:
    def case(library: Any, record: Record) -> None:
        net = configured(lambda m: None)(module_of(library, record))()
        trainer = fit(library, record, net, loader(), max_steps=8, max_epochs=-1)
        record.left["optimizers"] = None  # Lightning has a stand-in for one
        record.events = [event for event in record.events if event[0] != "end"]
        assert trainer.global_step == 8

    check(case)


# ---- overridden hooks ------------------------------------------------------------------------------------------------


def warms_up_by_hand(net: Any) -> Any:
    class Net(net):  # type: ignore[misc]
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (1 + self.trainer.global_step)
            self.note("step", epoch, batch_idx, isinstance(optimizer, SGD), isinstance(optimizer, Optimizer))
            optimizer.step(closure=optimizer_closure)

    return Net


def steps_every_second_batch(net: Any) -> Any:
    class Net(net):  # type: ignore[misc]
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx % 2 == 0:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    return Net


def forgets_the_closure(net: Any) -> Any:
    class Net(net):  # type: ignore[misc]
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None: ...

    return Net


def zeroes_by_hand(net: Any) -> Any:
    class Net(net):  # type: ignore[misc]
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            self.note("zero", epoch, batch_idx)
            optimizer.zero_grad(set_to_none=False)

        def on_before_zero_grad(self, optimizer: Any) -> None:
            self.note("before_zero", isinstance(optimizer, SGD))

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.note("before_step", [p.grad.abs().sum() for p in self.parameters()])

    return Net


def backward_by_hand(net: Any) -> Any:
    class Net(net):  # type: ignore[misc]
        def backward(self, loss: torch.Tensor) -> None:
            self.note("backward", loss)
            self.log("by_hand", loss, on_epoch=True)
            loss.backward()

        def on_before_backward(self, loss: torch.Tensor) -> None:
            self.note("before_backward", loss)

        def on_after_backward(self) -> None:
            self.note("after_backward", [p.grad.abs().sum() for p in self.parameters()])

    return Net


def clips_as_told(net: Any) -> Any:
    class Net(net):  # type: ignore[misc]
        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any
        ) -> None:
            self.note("clip", gradient_clip_val)
            self.clip_gradients(optimizer)

    return Net


def clips_otherwise(net: Any) -> Any:
    class Net(net):  # type: ignore[misc]
        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any
        ) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="value")

    return Net


class OwnScheduler:
    """No scheduler of torch's."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, epoch: int) -> None:
        self.optimizer.param_groups[0]["lr"] = 0.1 / (epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def steps_its_scheduler(net: Any) -> Any:
    class Net(net):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=0.1)
            return [optimizer], [OwnScheduler(optimizer)]

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            self.note("scheduler", metric)
            scheduler.step(epoch=self.current_epoch)

    return Net


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("build", "options"),
    [
        (warms_up_by_hand, {}),
        (steps_every_second_batch, {}),
        (zeroes_by_hand, {}),
        (backward_by_hand, {}),
        (clips_as_told, {"gradient_clip_val": 0.1}),
        (clips_as_told, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
        (clips_as_told, {}),
        (clips_otherwise, {}),
        (clips_otherwise, {"gradient_clip_val": 0.2}),  # refused by both
        (steps_its_scheduler, {"max_epochs": 3}),
        (forgets_the_closure, {}),  # refused by both
    ],
)
def test_overridden_hooks(build: Build, options: dict[str, Any], accumulate: int) -> None:
    ours, _ = same(build, accumulate_grad_batches=accumulate, **options)
    refused = build is forgets_the_closure or (build is clips_otherwise and bool(options))
    assert (ours.error is not None) == refused


# ---- what training_step returns, and how an epoch ends early ---------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_step_that_returns_none_is_skipped(accumulate: int) -> None:
    def build(net: Any) -> Any:
        class Net(net):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss = super().training_step(batch, batch_idx)
                return None if batch_idx in (1, 2) else loss

        return Net

    same(build, accumulate_grad_batches=accumulate)


def test_the_rest_of_a_returned_dict_reaches_the_hooks() -> None:
    def build(net: Any) -> Any:
        class Net(net):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss = super().training_step(batch, batch_idx)
                return {"loss": loss, "extra": loss.detach() * 2, "n": 3}

        return Net

    ours, _ = same(build, accumulate_grad_batches=2)
    assert next(event[5] for event in ours.events if event[0] == "end")["n"] == 3


@pytest.mark.parametrize("returned", [{"x": 1}, [1], "loss"])
def test_what_is_no_loss_is_refused(returned: Any) -> None:
    def build(net: Any) -> Any:
        class Net(net):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return returned

        return Net

    ours, _ = same(build)
    assert ours.error is MisconfigurationException


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"val_check_interval": 2}], ids=str)
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("at", [0, 2])
def test_minus_one_from_on_train_batch_start_skips_the_rest(at: int, interval: str, options: dict[str, Any]) -> None:
    def build(net: Any) -> Any:
        class Net(scheduled(halving, interval=interval)(net)):  # type: ignore[misc]
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
                return -1 if batch_idx == at and self.current_epoch != 1 else None

        return Net

    same(build, max_epochs=3, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_epochs": 3},
        {"min_steps": 9},
        {"validate": False},
        {"val_check_interval": 2, "min_steps": 2},
        {"check_val_every_n_epoch": 2, "min_epochs": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["start", "batch", "epoch", "validation"])
def test_a_stop_that_is_asked_for(where: str, options: dict[str, Any]) -> None:
    def build(net: Any) -> Any:
        class Net(scheduled(halving)(net)):  # type: ignore[misc]
            def stop(self, at: str) -> None:
                self.trainer.should_stop |= at == where

            def on_train_start(self) -> None:
                self.stop("start")

            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                super().on_train_batch_end(outputs, batch, batch_idx)
                if self.global_step == 3:
                    self.stop("batch")

            def on_train_epoch_end(self) -> None:
                super().on_train_epoch_end()
                if self.current_epoch == 1:
                    self.stop("epoch")

            def on_validation_epoch_end(self) -> None:
                super().on_validation_epoch_end()
                self.stop("validation")

        return Net

    same(build, max_epochs=5, **options)


# ---- manual optimization ---------------------------------------------------------------------------------------------


def by_hand(net: Any) -> Any:
    class Net(net):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.other = torch.nn.Linear(3, 1)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.note("before_step", isinstance(optimizer, SGD))

    return Net


def one_optimizer(net: Any) -> Any:
    class Net(by_hand(net)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer = self.optimizers()
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            self.note("stepped", self.global_step, isinstance(optimizer, Optimizer), isinstance(optimizer, SGD))
            return loss if batch_idx % 2 else None

    return Net


def accumulates(net: Any) -> Any:
    class Net(by_hand(net)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(super().training_step(batch, batch_idx))
            if (batch_idx + 1) % 2 == 0:
                self.optimizers().step()
                self.optimizers().zero_grad()

    return Net


def two_optimizers(net: Any) -> Any:
    class Net(by_hand(net)):  # type: ignore[misc]
        def note_grads(self) -> None:
            self.note([p.requires_grad for p in self.parameters()])

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            loss = self.loss(batch)
            self.note("train", *self.where(), loss)
            self.toggle_optimizer(first)
            self.note_grads()
            first.zero_grad()
            self.manual_backward(loss)
            first.step()
            self.untoggle_optimizer(first)
            self.note_grads()

            def closure() -> torch.Tensor:
                other: torch.Tensor = (self.other(batch[0]) - batch[1]).square().mean()
                second.zero_grad()
                self.manual_backward(other)
                return other

            with second.toggle_model():
                self.note_grads()
                if batch_idx % 2:
                    self.note("result", second.step(closure=closure))
            a, b = self.lr_schedulers()
            a.step()
            if self.trainer.is_last_batch:
                b.step()
            self.log_dict({"a": loss, "b": 2.0}, prog_bar=True)

        def configure_optimizers(self) -> Any:
            first, second = SGD(self.layer.parameters(), lr=0.1), torch.optim.Adam(self.other.parameters(), lr=0.1)
            return [first, second], [halving(first), {"scheduler": halving(second), "interval": "epoch", "name": "x"}]

    return Net


def dicts(net: Any) -> Any:
    class Net(by_hand(net)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.note(type(self.lr_schedulers()).__name__)
            for optimizer in self.optimizers():
                loss = self.loss(batch) + self.other(batch[0]).square().mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            self.note(self.global_step)

        def configure_optimizers(self) -> Any:
            first, second = SGD(self.layer.parameters(), lr=0.1), torch.optim.Adam(self.other.parameters(), lr=0.1)
            return [{"optimizer": first, "lr_scheduler": {"scheduler": halving(first)}}, {"optimizer": second}]

    return Net


def newton(net: Any) -> Any:
    class Net(by_hand(net)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> torch.Tensor:
                loss: torch.Tensor = self.loss(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=3)

    return Net


def bare_optimizer(net: Any) -> Any:
    class Net(by_hand(net)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.note(self.global_step)  # stays 0: the Trainer sees nothing of such steps

    return Net


def steps_a_plateau(net: Any) -> Any:
    class Net(one_optimizer(net)):  # type: ignore[misc]
        def on_validation_epoch_end(self) -> None:
            if not self.trainer.sanity_checking:
                self.lr_schedulers().step(self.trainer.callback_metrics["val_loss"])

        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=0.1)
            return {"optimizer": optimizer, "lr_scheduler": impatient(optimizer)}

    return Net


def weights_of_a_closure(net: Any) -> Any:
    class Net(by_hand(net)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().step(closure=3)

    return Net


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (one_optimizer, {}),
        (one_optimizer, {"max_steps": 7, "max_epochs": -1}),
        (one_optimizer, {"precision": "bf16-mixed"}),
        (accumulates, {"log_every_n_steps": 3}),
        (accumulates, {"log_every_n_steps": 1}),
        (two_optimizers, {"max_steps": 15, "max_epochs": -1}),
        (dicts, {}),
        (newton, {}),
        (bare_optimizer, {}),
        (steps_a_plateau, {"max_epochs": 4}),
    ],
)
def test_manual_optimization(build: Build, options: dict[str, Any]) -> None:
    ours, _ = same(build, **options)
    assert ours.error is None


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (one_optimizer, {"gradient_clip_val": 1.0}),
        (one_optimizer, {"accumulate_grad_batches": 2}),
        (weights_of_a_closure, {}),
    ],
)
def test_both_refuse_by_hand(build: Build, options: dict[str, Any]) -> None:
    ours, theirs = same(build, **options)
    assert ours.error is MisconfigurationException and theirs.error is not None


def test_manual_backward_belongs_to_manual_optimization() -> None:
    def build(net: Any) -> Any:
        class Net(net):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.manual_backward(self.loss(batch))

        return Net

    ours, theirs = same(build)
    assert ours.error is MisconfigurationException and theirs.error is not None


@pytest.mark.parametrize("signature", ["batch", "b, i", "*args, **kwargs"])
def test_arguments_of_the_steps(signature: str) -> None:
    def build(net: Any) -> Any:
        if signature == "batch":

            class Net(net):  # type: ignore[misc]
                def training_step(self, batch: Any) -> Any:
                    return self.loss(batch)

                def validation_step(self, batch: Any) -> None:
                    self.log("v", self.loss(batch))

        elif signature == "b, i":

            class Net(net):  # type: ignore[misc, no-redef]
                def training_step(self, b: Any, i: int) -> Any:
                    self.note(i)
                    return self.loss(b)

                def validation_step(self, b: Any, i: int) -> None:
                    self.note(i)

        else:

            class Net(net):  # type: ignore[misc, no-redef]
                def training_step(self, *args: Any, **kwargs: Any) -> Any:
                    self.note(len(args), sorted(kwargs))
                    return self.loss(args[0])

        return Net

    same(build)
