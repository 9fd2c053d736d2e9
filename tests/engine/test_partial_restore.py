"""Checkpointer.restore of a part, or of what does not fit in all; and its report."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from milepost import Checkpointer
from milepost.errors import MisconfigurationException, ResumeError


def model(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def trained(made: nn.Module, kind: Any = torch.optim.AdamW) -> torch.optim.Optimizer:
    optimizer = kind(made.parameters(), lr=0.1)
    for parameter in made.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Checkpointer, dict[str, Any]]:
    net = model(3, 4, 5)
    state = {"model": net, "optimizer": trained(net), "epoch": 7}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, state, wait=True)
    return checkpointer, state


def test_all_of_it_is_reported_as_restored(saved: Any) -> None:
    checkpointer, state = saved
    net = model(3, 4, 5)
    live = {"model": net, "optimizer": torch.optim.AdamW(net.parameters()), "epoch": 0}
    assert checkpointer.report is None and checkpointer.restore(live) == 3
    report = checkpointer.report
    assert report.complete and report.step == 3
    assert (report.missing, report.unused, report.unfit) == ([], [], {})
    assert live["epoch"] == 7 and torch.equal(net[1].weight, state["model"][1].weight)


def test_one_part_leaves_the_others_as_they_are(saved: Any) -> None:
    checkpointer, state = saved
    net = model(3, 4, 5)
    live = {"model": net, "optimizer": torch.optim.SGD(net.parameters(), lr=0.5), "epoch": 0}
    checkpointer.restore(live, parts={"model"})
    assert torch.equal(net[0].weight, state["model"][0].weight)
    assert live["epoch"] == 0 and live["optimizer"].param_groups[0]["lr"] == 0.5
    assert checkpointer.report.parts == {"model": "restored", "optimizer": "left out", "epoch": "left out"}
    with pytest.raises(MisconfigurationException, match="weights"):
        checkpointer.restore(live, parts={"weights"})


def test_names_more_and_fewer_and_other_shapes_stay_as_they_are(saved: Any) -> None:
    checkpointer, state = saved
    net = model(3, 4, 6, 2)
    net[0].register_parameter("bias", None)
    before = {name: p.clone() for name, p in net.named_parameters()}
    with pytest.raises(ResumeError, match="strict=False"):
        checkpointer.restore({"model": net})
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    checkpointer.restore({"model": net, "more": 1}, strict=False)
    report = checkpointer.report
    assert report.parts == {"model": "restored in part", "more": "not in the checkpoint"} and not report.complete
    assert report.missing == ["more", "model.2.bias", "model.2.weight"]
    assert report.unused == ["epoch", "optimizer", "model.0.bias"]
    assert set(report.unfit) == {"model.1.weight", "model.1.bias"} and "[5, 4]" in report.unfit["model.1.weight"]
    assert torch.equal(net[0].weight, state["model"][0].weight)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters() if name != "0.weight")


def test_the_state_of_a_parameter_that_begins_anew_begins_anew(saved: Any) -> None:
    checkpointer, state = saved
    net = model(3, 4, 5)
    net[1] = nn.Linear(4, 9)
    optimizer = torch.optim.AdamW(net.parameters())
    checkpointer.restore({"model": net, "optimizer": optimizer}, strict=False)
    assert set(optimizer.state) == set(net[0].parameters())
    kept = state["optimizer"].state[state["model"][0].weight]["exp_avg"]
    assert torch.equal(optimizer.state[net[0].weight]["exp_avg"], kept)
    assert checkpointer.report.parts == {"model": "restored in part", "optimizer": "restored in part"}
    assert [name for name in checkpointer.report.unfit if "optimizer" in name] == [
        "optimizer.state.2",
        "optimizer.state.3",
    ]
    trained(net)


@pytest.mark.parametrize("changed", ["another class", "frozen parameters"])
def test_a_changed_optimizer_is_left_out_whole(saved: Any, changed: str) -> None:
    checkpointer, _ = saved
    net = model(3, 4, 5)
    net[0].requires_grad_(changed != "frozen parameters")
    kind: Any = torch.optim.SGD if changed == "another class" else torch.optim.AdamW
    optimizer = kind([p for p in net.parameters() if p.requires_grad], lr=0.5)
    live = {"model": net, "optimizer": optimizer}
    with pytest.raises(ResumeError, match="optimizer"):
        checkpointer.restore(live)
    checkpointer.restore(live, strict=False)
    assert checkpointer.report.parts == {"model": "restored", "optimizer": "left out"}
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.5
    assert (
        "parameters" in checkpointer.report.unfit["optimizer"] or "settings" in checkpointer.report.unfit["optimizer"]
    )


def test_what_was_tied_may_be_two_tensors_now(tmp_path: Path) -> None:
    tied = model(3, 3, 3)
    tied[1].weight = tied[0].weight
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": tied}, wait=True)
        apart = model(3, 3, 3)
        checkpointer.restore({"model": apart})
    assert torch.equal(apart[0].weight, tied[0].weight) and torch.equal(apart[1].weight, tied[0].weight)
