"""Finetuning: Lightning's weights, bit for bit, and a run that is cut after the unfreezing trains the same parts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from both_sides import BATCHES, LIGHTNINGS_OWN, assert_equal_state, fit

import milepost
from milepost.callbacks import BackboneFinetuning, BaseFinetuning
from milepost.errors import MisconfigurationException, ResumeError

pl = pytest.importorskip("pytorch_lightning")
pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNINGS_OWN]


def net(side: Any, *, filtered: bool = True, norm: bool = True) -> Any:
    class Net(side.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            middle = [torch.nn.BatchNorm1d(6)] if norm else []
            self.backbone = torch.nn.Sequential(torch.nn.Linear(4, 6), *middle, torch.nn.Linear(6, 6))
            self.head = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.Linear(3, 1))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = (self.head(self.backbone(batch[0])) - batch[1]).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            chosen = [p for p in self.parameters() if p.requires_grad or not filtered]
            optimizer = torch.optim.Adam(chosen, lr=0.05)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)]

    return Net()


def backbone(side: Any, **options: Any) -> Any:
    return side.callbacks.BackboneFinetuning(**{"unfreeze_backbone_at_epoch": 1, **options})


def in_parts(side: Any) -> Any:
    """Unfreezes one layer after the other, the batch norm frozen too."""

    class InParts(side.callbacks.BaseFinetuning):  # type: ignore[misc]
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.backbone, train_bn=False)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch in (1, 2):
                part = [pl_module.backbone[-1]] if epoch == 1 else [pl_module.backbone[0], [pl_module.backbone[1]]]
                self.unfreeze_and_add_param_group(part, optimizer, initial_denom_lr=4)

    return InParts()


def turns(side: Any) -> Any:
    """Backbone and head by turns: what stands in the optimizer may be frozen all the same."""

    class Turns(side.callbacks.BaseFinetuning):  # type: ignore[misc]
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.backbone, train_bn=False)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 2:
                self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)
                self.freeze(pl_module.head)

    return Turns()


def once(side: Any) -> Any:
    return backbone(side, backbone_initial_lr=0.01, should_align=False, lambda_func=lambda epoch: 1.5, train_bn=False)


@pytest.mark.parametrize("callback", [backbone, in_parts, once])
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_weights_are_those_of_lightning(callback: Any, tmp_path: Path) -> None:
    runs = [fit(side, tmp_path / side.__name__, net, [callback(side)], 4) for side in (milepost, pl)]
    assert_equal_state(runs[0][1], runs[1][1])
    ours, theirs = ([g["lr"] for g in trainer.optimizers[0].param_groups] for trainer, _ in runs)
    assert ours == theirs


@pytest.mark.parametrize("callback", [backbone, in_parts, turns])
def test_a_run_that_is_cut_at_any_step_ends_with_the_same_weights(callback: Any, tmp_path: Path) -> None:
    def run(folder: str, resume: Path | None = None) -> Any:
        return fit(milepost, tmp_path / folder, net, [callback(milepost)], 4, resume)

    trainer, whole = run("whole")
    for step in (3, BATCHES, BATCHES + 1, 2 * BATCHES, 3 * BATCHES + 4):
        again, resumed = run(f"from {step}", tmp_path / "whole" / f"{step}.ckpt")
        assert_equal_state(whole, resumed)
        assert [p.requires_grad for p in whole.parameters()] == [p.requires_grad for p in resumed.parameters()]
        assert again.optimizers[0].state_dict()["param_groups"] == trainer.optimizers[0].state_dict()["param_groups"]


def test_a_file_of_lightning_goes_on_with_the_backbone_trained(tmp_path: Path) -> None:
    """Lightning itself freezes the backbone again: its resumed run leaves it as the file has it."""
    make = lambda side: net(side, norm=False)  # noqa: E731
    fit(pl, tmp_path / "theirs", make, [backbone(pl)], 4)
    whole = fit(milepost, tmp_path / "ours", make, [backbone(milepost)], 4)[1]
    file = tmp_path / "theirs" / f"{3 * BATCHES}.ckpt"
    resumed = fit(milepost, tmp_path / "resumed", make, [backbone(milepost)], 4, file)[1]
    assert_equal_state(whole, resumed)


def test_lightning_goes_on_from_our_file_as_from_its_own(tmp_path: Path) -> None:
    make = lambda side: net(side, norm=False)  # noqa: E731
    ends = []
    for side in (pl, milepost):
        fit(side, tmp_path / side.__name__, make, [backbone(side)], 3)
        file = tmp_path / side.__name__ / f"{2 * BATCHES}.ckpt"
        ends.append(fit(pl, tmp_path / f"from {side.__name__}", make, [backbone(pl)], 3, file)[1])
    assert_equal_state(*ends)
    before = torch.load(file, weights_only=True)["state_dict"]["backbone.0.weight"]
    assert torch.equal(ends[1].backbone[0].weight, before)  # frozen again


def test_an_optimizer_that_has_the_frozen_parameters_is_reported(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="requires_grad"):
        trainer, _ = fit(milepost, tmp_path, lambda s: net(s, filtered=False, norm=False), [backbone(milepost)], 2)
    assert len(trainer.optimizers[0].param_groups) == 1


def test_parameters_of_equal_value_are_told_apart() -> None:
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    BaseFinetuning.freeze(other)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    BaseFinetuning.unfreeze_and_add_param_group(other, optimizer)
    assert optimizer.param_groups[1]["params"] == list(other.parameters()) and optimizer.param_groups[1]["lr"] == 0.01


def test_what_counts_as_a_module() -> None:
    shared = torch.nn.ModuleDict({"a": torch.nn.Linear(1, 1), "b": torch.nn.Sequential(torch.nn.BatchNorm1d(1))})
    assert [type(m).__name__ for m in BaseFinetuning.flatten_modules([shared, [torch.nn.ReLU()]])] == [
        "Linear", "BatchNorm1d", "ReLU",
    ]  # fmt: skip
    BaseFinetuning.freeze(shared)
    assert {p.numel() for p in BaseFinetuning.filter_params(shared, requires_grad=False)} == {1}
    assert len(list(BaseFinetuning.filter_params(shared))) == 2
    assert list(BaseFinetuning.filter_params(shared, train_bn=False)) == []


def test_rates_are_logged_when_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "milepost"):
        fit(milepost, tmp_path, net, [backbone(milepost, verbose=True, rounding=3)], 3)
    assert [r.message for r in caplog.records if "Backbone" in r.message] == [
        "Current lr: 0.045, Backbone lr: 0.005", "Current lr: 0.041, Backbone lr: 0.009",
    ]  # fmt: skip


def test_a_module_without_a_backbone_is_refused(tmp_path: Path) -> None:
    class Bare(milepost.Module):
        pass

    with pytest.raises(MisconfigurationException, match="backbone"):
        BackboneFinetuning().setup(milepost.Trainer(accelerator="cpu", logger=False), Bare(), "fit")


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path: Path) -> None:
    fit(milepost, tmp_path / "a", net, [backbone(milepost)], 2)

    def renamed(side: Any) -> Any:
        module = net(side)
        module.top = module.head
        del module.head
        type(module).on_load_checkpoint = lambda self, checkpoint: checkpoint.update(
            state_dict={k.replace("head.", "top."): v for k, v in checkpoint["state_dict"].items()}
        )
        return module

    with pytest.raises(ResumeError, match=r"head\.0\.bias"):
        fit(milepost, tmp_path / "b", renamed, [backbone(milepost)], 2, tmp_path / "a" / "8.ckpt")


def test_without_its_state_the_backbone_is_not_trained_in_silence(tmp_path: Path) -> None:
    fit(milepost, tmp_path / "a", lambda s: net(s, filtered=False), [], 3)
    with pytest.raises(ResumeError, match="without its state"):
        fit(milepost, tmp_path / "b", lambda s: net(s, filtered=False), [backbone(milepost)], 4,
            tmp_path / "a" / f"{3 * BATCHES}.ckpt")  # fmt: skip
