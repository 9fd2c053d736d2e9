"""Weight averaging: which weights stand where, and a resume that continues both sets bit for bit."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from milepost.callbacks import EMAWeightAveraging, WeightAveraging


class Model(nn.Sequential):
    """What the callback needs of a Module."""

    _trainer: Any = None
    trainer: Any = None
    strict_loading = True
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 1), nn.BatchNorm1d(1))


class Run:
    """Drives the hooks as a Trainer does: every step adds 1 to all weights."""

    def __init__(self, callback: WeightAveraging, checkpoint: dict[str, Any] | None = None) -> None:
        self.callback, self.model = callback, Model()
        self.trainer: Any = SimpleNamespace(
            global_step=0, current_epoch=0, state=SimpleNamespace(fn="fit"), finish_staging=lambda: None
        )
        callback.setup(self.trainer, self.model, "fit")
        if checkpoint is not None:
            self.trainer.global_step = checkpoint["global_step"]
            self.model.load_state_dict(checkpoint["state_dict"])
            callback.on_load_checkpoint(self.trainer, self.model, checkpoint)
            callback.load_state_dict(checkpoint["callback"])
        else:
            with torch.no_grad():
                for p in self.model.parameters():
                    p.zero_()
        callback.on_fit_start(self.trainer, self.model)

    def steps(self, count: int, *, accumulate: int = 1) -> Run:
        for _ in range(count):
            with torch.no_grad():
                for p in self.model.parameters():
                    p.add_(1.0)
            self.trainer.global_step += 1
            for index in range(accumulate):
                self.callback.on_train_batch_end(self.trainer, self.model, None, None, index)
        return self

    def save(self) -> dict[str, Any]:
        checkpoint = {"state_dict": self.model.state_dict(), "global_step": self.trainer.global_step}
        self.callback.on_save_checkpoint(self.trainer, self.model, checkpoint)
        checkpoint["callback"] = self.callback.state_dict()
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        buffer.seek(0)
        loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
        return loaded

    @property
    def weight(self) -> float:
        return self.model[0].bias.item()


def test_checkpoint_form() -> None:
    checkpoint = Run(WeightAveraging()).steps(4).save()
    assert checkpoint["state_dict"]["0.bias"].item() == 2.5  # the mean of 1, 2, 3, 4
    assert checkpoint["current_model_state"]["0.bias"].item() == 4.0
    assert {k: v.item() for k, v in checkpoint["averaging_state"].items()} == {"n_averaged": 4}
    assert checkpoint["callback"] == {"latest_update_step": 4}
    assert set(checkpoint["state_dict"]) == set(checkpoint["current_model_state"]) == set(Model().state_dict())


@pytest.mark.parametrize("make", [WeightAveraging, lambda: EMAWeightAveraging(decay=0.7, update_every_n_steps=2)])
@pytest.mark.parametrize("cut", [1, 2, 3, 7])
def test_a_resumed_run_equals_one_that_was_not_cut(make: Any, cut: int) -> None:
    whole = Run(make()).steps(8).save()
    resumed = Run(make(), Run(make()).steps(cut).save()).steps(8 - cut).save()
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert all(torch.equal(whole[part][key], resumed[part][key]) for key in whole[part]), part
    assert whole["callback"] == resumed["callback"]


def test_validation_sees_the_average_and_training_goes_on_from_its_own() -> None:
    run = Run(WeightAveraging()).steps(4)
    with torch.inference_mode():
        run.callback.on_validation_epoch_start(run.trainer, run.model)
        assert run.weight == 2.5
        during = run.save()
        run.callback.on_validation_epoch_end(run.trainer, run.model)
    assert run.weight == 4.0
    assert during["state_dict"]["0.bias"].item() == 2.5 and during["current_model_state"]["0.bias"].item() == 4.0


def test_an_error_during_validation_puts_the_weights_back() -> None:
    run = Run(WeightAveraging()).steps(4)
    run.callback.on_validation_epoch_start(run.trainer, run.model)
    run.callback.on_exception(run.trainer, run.model, KeyboardInterrupt())
    assert run.weight == 4.0


def test_the_finished_model_is_the_average_and_can_still_be_resumed() -> None:
    run = Run(WeightAveraging()).steps(4)
    run.callback.on_train_end(run.trainer, run.model)
    assert run.weight == 2.5
    run.callback.on_validation_epoch_start(run.trainer, run.model)  # trainer.validate after fit
    assert run.weight == 2.5
    run.callback.on_validation_epoch_end(run.trainer, run.model)
    assert run.weight == 2.5
    assert Run(WeightAveraging(), run.save()).steps(1).weight == 5.0


def test_an_evaluation_looks_at_the_average() -> None:
    checkpoint = Run(WeightAveraging()).steps(3).save()
    run = Run(WeightAveraging())
    run.trainer.state.fn = "validate"
    run.model.load_state_dict(checkpoint["state_dict"])
    run.callback.on_load_checkpoint(run.trainer, run.model, checkpoint)
    assert all(torch.equal(run.model.state_dict()[key], value) for key, value in checkpoint["state_dict"].items())
    assert not torch.equal(checkpoint["state_dict"]["0.weight"], checkpoint["current_model_state"]["0.weight"])


def test_a_checkpoint_without_an_average_begins_one() -> None:
    plain = {"state_dict": Run(WeightAveraging()).steps(3).model.state_dict(), "global_step": 3}
    plain["callback"] = {"latest_update_step": 0}
    checkpoint = Run(WeightAveraging(), plain).save()
    assert checkpoint["state_dict"]["0.bias"].item() == 3.0
    assert checkpoint["averaging_state"]["n_averaged"].item() == 0


def test_accumulated_batches_count_as_one_step() -> None:
    checkpoint = Run(WeightAveraging()).steps(3, accumulate=4).save()
    assert checkpoint["averaging_state"]["n_averaged"].item() == 3


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [
        ({}, [0, 1, 2, 3, 4, 5], []),
        ({"update_every_n_steps": 2}, [0, 2, 4], []),
        ({"update_starting_at_step": 4}, [4, 5], []),
        ({"update_every_n_steps": 0, "update_starting_at_epoch": 3}, [], [3, 4, 5]),
    ],
)
def test_when_ema_updates(options: dict[str, int], steps: list[int], epochs: list[int]) -> None:
    callback = EMAWeightAveraging(**options)  # type: ignore[arg-type]
    assert [i for i in range(6) if callback.should_update(step_idx=i)] == steps
    assert [i for i in range(6) if callback.should_update(epoch_idx=i)] == epochs


def test_ema_formula() -> None:
    checkpoint = Run(EMAWeightAveraging(decay=0.75)).steps(2).save()
    assert checkpoint["state_dict"]["0.bias"].item() == 0.75 * 1 + 0.25 * 2
