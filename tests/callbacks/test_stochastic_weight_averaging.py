"""StochasticWeightAveraging: Lightning's weights, bit for bit, and the same ones after a cut at any step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from both_sides import BATCHES, LIGHTNINGS_OWN, assert_equal_state, fit
from torch.optim.swa_utils import SWALR

import milepost
from milepost.callbacks import StochasticWeightAveraging
from milepost.errors import MisconfigurationException

pl = pytest.importorskip("pytorch_lightning")
pytestmark = [pytest.mark.filterwarnings(text) for text in [*LIGHTNINGS_OWN, "ignore:SWA is initializing after"]]


def net(side: Any, *, norm: bool = False, schedule: bool = True, dropout: bool = False) -> Any:
    class Net(side.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            middle = [torch.nn.BatchNorm1d(6)] if norm else []
            last = [torch.nn.Dropout(0.3)] if dropout else []
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, 6), *middle, *last, torch.nn.Linear(6, 1))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = (self.layers(batch[0]) - batch[1]).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            if not schedule:
                return optimizer
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]

    return Net()


def averaging(side: Any, **options: Any) -> Any:
    settings = {"swa_lrs": 0.05, "swa_epoch_start": 2, "annealing_epochs": 3, **options}
    return side.callbacks.StochasticWeightAveraging(**settings)


CASES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({}, {}, {}),
    ({"norm": True}, {}, {}),
    ({"norm": True, "schedule": False}, {"annealing_strategy": "linear"}, {"accumulate_grad_batches": 2}),
    ({"schedule": False}, {"swa_epoch_start": 0.5, "swa_lrs": [0.02]}, {}),
    ({}, {"avg_fn": lambda average, new, count: 0.9 * average + 0.1 * new}, {}),
]


@pytest.mark.parametrize(("module", "callback", "trainer"), CASES)
def test_weights_are_those_of_lightning(
    module: dict[str, Any], callback: dict[str, Any], trainer: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs = averaging(milepost, **callback), averaging(pl, **callback)
    make = lambda side: net(side, **module)  # noqa: E731
    result = fit(milepost, tmp_path / "mp", make, [ours], 5, **trainer)[1]
    expected = fit(pl, tmp_path / "pl", make, [theirs], 5, **trainer)[1]
    if module.get("norm"):
        # Lightning's pass for batch norm ends with one more optimizer step, by gradients that were used before: the
        # average is in the callback, the module has left it.
        average = torch.nn.utils.parameters_to_vector(theirs._average_model.parameters())
        assert not torch.equal(average, torch.nn.utils.parameters_to_vector(expected.parameters()))
        torch.nn.utils.vector_to_parameters(average, expected.parameters())
    assert_equal_state(result, expected)


@pytest.mark.parametrize("norm", [False, True])
def test_a_run_that_is_cut_at_any_step_ends_with_the_same_weights(norm: bool, tmp_path: Path) -> None:
    def run(folder: str, resume: Path | None = None) -> Any:
        make = lambda side: net(side, norm=norm, dropout=True)  # noqa: E731
        return fit(milepost, tmp_path / folder, make, [averaging(milepost)], 4, resume)

    def counts(trainer: Any) -> tuple[int, int]:
        state = trainer.callbacks[0].state_dict()
        return state["n_averaged"], state["latest_update_epoch"]

    trainer, whole = run("whole")
    assert counts(trainer) == (3, 3)
    for step in (2, BATCHES, BATCHES + 2, 2 * BATCHES, 3 * BATCHES + 1, 4 * BATCHES):
        again, resumed = run(f"from {step}", tmp_path / "whole" / f"{step}.ckpt")
        assert_equal_state(whole, resumed)
        assert counts(again) == counts(trainer)
        assert again.optimizers[0].param_groups[0]["lr"] == trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.filterwarnings("ignore:The checkpoint was written by Lightning in the middle")
def test_each_goes_on_from_the_others_file(tmp_path: Path) -> None:
    def run(side: Any, folder: str, resume: str | None = None) -> Any:
        path = None if resume is None else tmp_path / resume / f"{3 * BATCHES}.ckpt"
        return fit(side, tmp_path / folder, net, [averaging(side)], 4, path)[1]

    whole = run(milepost, "ours")
    run(pl, "theirs")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    if "anneal_func" in SWALR(optimizer, 0.1).state_dict():
        pytest.skip("with this torch Lightning pickles a function into its file, which is not loaded")
    assert_equal_state(run(milepost, "ours from theirs", "theirs"), whole)
    # Lightning does not resume this callback exactly (making the scheduler moves the restored learning rate), but it
    # goes on from our file just as it does from its own.
    assert_equal_state(run(pl, "theirs from ours", "ours"), run(pl, "theirs from theirs", "theirs"))


def test_a_run_that_stops_early_gives_the_average_too(tmp_path: Path) -> None:
    callback = averaging(milepost)
    module = fit(milepost, tmp_path, net, [callback], 9, max_steps=3 * BATCHES)[1]
    assert callback.n_averaged == 2
    saved = torch.load(tmp_path / f"{3 * BATCHES}.ckpt", weights_only=True)
    assert not torch.equal(saved["state_dict"]["layers.0.weight"], module.layers[0].weight)
    average = saved["callbacks"]["StochasticWeightAveraging"]["average_model_state"]
    assert torch.equal(average["layers.0.weight"], module.layers[0].weight)


def test_the_pass_for_batch_norm_trains_and_records_nothing(tmp_path: Path) -> None:
    trainer, module = fit(milepost, tmp_path, lambda side: net(side, norm=True), [averaging(milepost)], 4)
    assert trainer.global_step == 4 * BATCHES and trainer.current_epoch == 4
    assert module.layers[1].momentum == 0.1 and module.layers[1].num_batches_tracked == BATCHES


@pytest.mark.parametrize(
    "arguments",
    [
        {"swa_lrs": 0.0},
        {"swa_lrs": []},
        {"swa_lrs": 0.1, "swa_epoch_start": 0},
        {"swa_lrs": 0.1, "swa_epoch_start": 1.5},
        {"swa_lrs": 0.1, "annealing_strategy": "sine"},
        {"swa_lrs": 0.1, "annealing_epochs": -1},
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=list(arguments)[-1]):
        StochasticWeightAveraging(**arguments)


def test_a_fraction_of_no_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="max_epochs"):
        fit(milepost, tmp_path, net, [averaging(milepost, swa_epoch_start=0.5)], -1, max_steps=3)
