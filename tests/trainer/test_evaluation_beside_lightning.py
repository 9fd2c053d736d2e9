"""``validate``, ``test`` and ``predict`` return, log and leave behind what pytorch-lightning's do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside import SETTINGS, Flow, Record, check, loader, logger_of, module_of, note_left, plain, views
from torch.utils.data import DataLoader

from milepost.errors import MisconfigurationException


def evaluated(stage: str, net: Any) -> Any:
    """A module whose steps of `stage` log in every way, and note where they are."""
    hook = "validation" if stage == "validate" else stage

    class Net(net):  # type: ignore[misc]
        def step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            loss = self.loss(batch)
            self.note(batch_idx, dataloader_idx, loss, self.training, torch.is_inference_mode_enabled())
            self.note(torch.is_grad_enabled(), self.trainer.global_step, self.trainer.current_epoch)
            if stage != "predict":
                self.log("loss", loss, prog_bar=True)
                self.log("both", loss, on_step=True, on_epoch=True)
                self.log("hidden", loss, logger=False)
                self.log("most", loss, reduce_fx="max")
                self.note(views(self.trainer))
            return loss

        def on_epoch_end(self) -> None:
            if stage != "predict":
                self.log("late", 4.0)
                self.note(views(self.trainer))

        def on_end(self) -> None:
            self.note("end", views(self.trainer) if stage != "predict" else None)

    setattr(Net, f"{hook}_step", Net.step)
    setattr(Net, f"on_{hook}_epoch_end", Net.on_epoch_end)
    setattr(Net, f"on_{hook}_end", Net.on_end)
    return Net


def flow() -> DataLoader[Any]:
    return DataLoader(Flow(11, 2), batch_size=4)


@pytest.mark.parametrize(
    ("limit", "options"),
    [(0.5, {}), (0, {}), (1.0, {"inference_mode": False}), (1.0, {"fast_dev_run": 1})],
    ids=str,
)
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize(
    "make",
    [lambda: loader(3, seed=2), lambda: [loader(2), loader(4, seed=3)], flow],
    ids=["one", "two", "unknown length"],
)
def test_same_results(make: Callable[[], Any], stage: str, limit: int | float, options: dict[str, Any]) -> None:
    def case(library: Any, record: Record) -> None:
        net = evaluated(stage, module_of(library, record))()
        net.layer[1].eval()  # a part that the user has frozen
        settings = {**SETTINGS, "logger": logger_of(library, record), **options}
        settings[f"limit_{'val' if stage == 'validate' else stage}_batches"] = limit
        trainer = library.Trainer(**settings)
        run: Callable[..., Any] = getattr(trainer, stage)
        for _ in range(2):
            results = run(net, make(), **({} if stage == "predict" else {"verbose": False}))
            record.events.append(plain(results))
        note_left(record, net, trainer)
        record.left["modes"] = [module.training for module in net.modules()]

    ours, _ = check(case)
    assert (ours.error is not None) == (limit == 0.5 and make is flow)


def test_predictions_may_be_left_to_callbacks() -> None:
    def case(library: Any, record: Record) -> None:
        trainer = library.Trainer(**SETTINGS, logger=False)
        net = module_of(library, record)()
        net.forward = lambda batch: batch[0].sum()
        record.events.append(plain(trainer.predict(net, loader(), return_predictions=False)))
        record.events.append(plain(trainer.predict(net, loader())))

    check(case)


def test_between_two_fits() -> None:
    """What an evaluation shows takes the place of what fit showed; the next fit is not changed by it."""

    def case(library: Any, record: Record) -> None:
        net = module_of(library, record)()
        trainer = library.Trainer(**SETTINGS, logger=logger_of(library, record))
        trainer.fit(net, loader(), loader(3, seed=2))
        record.events.append(plain(trainer.test(net, loader(2, seed=5), verbose=False)))
        record.events.append(views(trainer))
        record.events.append(plain(trainer.validate(net, loader(2, seed=6), verbose=False)))
        record.events.append(views(trainer))
        trainer.fit_loop.max_epochs = 3
        trainer.fit(net, loader(), loader(3, seed=2))
        note_left(record, net, trainer)

    check(case)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_overridden_modes(stage: str) -> None:
    hook = "validation" if stage == "validate" else stage

    def case(library: Any, record: Record) -> None:
        base = evaluated(stage, module_of(library, record))

        def stays(self: Any) -> None:
            self.note("eval")

        def trains(self: Any) -> None:
            self.note("train")

        cls = type("Net", (base,), {f"on_{hook}_model_eval": stays, f"on_{hook}_model_train": trains})
        trainer = library.Trainer(**SETTINGS, logger=False)
        record.events.append(plain(getattr(trainer, stage)(cls(), loader(3), verbose=False)))

    check(case)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_without_loaders_it_is_refused(stage: str) -> None:
    def case(library: Any, record: Record) -> None:
        getattr(library.Trainer(**SETTINGS, logger=False), stage)(module_of(library, record)())

    ours, theirs = check(case)
    assert ours.error is MisconfigurationException and theirs.error is not None


def test_nothing_can_be_logged_in_predict() -> None:
    def case(library: Any, record: Record) -> None:
        class Net(module_of(library, record)):  # type: ignore[misc]
            def predict_step(self, batch: Any, batch_idx: int) -> None:
                self.log("x", 1.0)

        library.Trainer(**SETTINGS, logger=False).predict(Net(), loader())

    ours, theirs = check(case)
    assert ours.error is MisconfigurationException and theirs.error is not None
