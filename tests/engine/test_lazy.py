"""Lazy staging: the snapshot is of the moment of `save`, whichever way the next step changes the tensors."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from milepost import Checkpointer
from milepost.errors import MisconfigurationException


class Loop:
    """A model with BatchNorm, an optimizer, and a copying thread that is held up until `go` is set."""

    def __init__(self, folder: Path, optimizer: Any, lazy: bool = True) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))
        self.optimizer = optimizer(self.model.parameters())
        self.state = {"model": self.model, "optimizer": self.optimizer}
        self.checkpointer = Checkpointer(folder, lazy=lazy, threads=1)
        self.go = threading.Event()

    def forward_and_backward(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(4, 8)).square().sum()
        loss.backward()
        return loss

    def step(self) -> None:
        self.forward_and_backward()
        self.optimizer.step(self.forward_and_backward if isinstance(self.optimizer, torch.optim.LBFGS) else None)

    def hold_up_the_copying(self) -> None:
        self.checkpointer._engine._started().pool.submit(self.go.wait)


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return set(found) == set(expected) and all(same(found[k], expected[k]) for k in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


OPTIMIZERS = {
    "AdamW for-loop": lambda p: torch.optim.AdamW(p, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_step_waits_and_the_snapshot_is_of_before_it(tmp_path: Path, name: str) -> None:
    loop = Loop(tmp_path, OPTIMIZERS[name])
    loop.step()
    loop.hold_up_the_copying()
    expected = copy.deepcopy({k: v.state_dict() for k, v in loop.state.items()})
    handle = loop.checkpointer.save(1, loop.state)
    with pytest.raises(TimeoutError):
        handle.staged(timeout=0)
    loop.forward_and_backward()  # changes BatchNorm's buffers, which were copied at once
    weight = loop.model[0].weight.detach().clone()
    stepping = threading.Thread(target=loop.step)
    stepping.start()
    stepping.join(0.2)  # not a proof by time: whatever it does until then, it cannot have stepped
    assert torch.equal(loop.model[0].weight, weight)
    loop.go.set()
    stepping.join()
    assert not torch.equal(loop.model[0].weight, weight)
    loop.checkpointer.wait()
    assert same(loop.checkpointer.load(1), expected)
    loop.checkpointer.close()


def test_a_grad_scaler_and_steps_inside_of_backward_wait_too(tmp_path: Path) -> None:
    loop = Loop(tmp_path, lambda p: torch.optim.SGD(p, lr=0.1))
    scaler = torch.amp.GradScaler("cpu")
    inside = {p: torch.optim.SGD([p], lr=0.1) for p in loop.model.parameters()}

    def by_scaler() -> None:
        loss = loop.model(torch.randn(4, 8)).sum()
        scaler.scale(loss).backward()
        scaler.step(loop.optimizer)
        scaler.update()

    def in_backward() -> None:
        hooks = [p.register_post_accumulate_grad_hook(lambda q: inside[q].step()) for p in loop.model.parameters()]
        loop.forward_and_backward()
        for hook in hooks:
            hook.remove()

    for step, work in enumerate((by_scaler, in_backward), start=1):
        loop.go.clear()
        loop.hold_up_the_copying()
        expected = copy.deepcopy(loop.model.state_dict())
        loop.checkpointer.save(step, loop.state)
        working = threading.Thread(target=work)
        working.start()
        loop.go.set()
        working.join()
        loop.checkpointer.wait()
        assert same(loop.checkpointer.load(step)["model"], expected)
    loop.checkpointer.close()


def test_what_no_optimizer_knows_is_copied_at_once(tmp_path: Path) -> None:
    loop = Loop(tmp_path, torch.optim.AdamW)
    average = {k: v.clone() for k, v in loop.model.state_dict().items()}
    state = {**loop.state, "average": average, "gradients": {"g": torch.ones(5)}}
    loop.step()
    loop.hold_up_the_copying()
    loop.checkpointer.save(1, state)
    expected = copy.deepcopy(average)
    for tensor in (*average.values(), state["gradients"]["g"]):
        tensor.add_(1)
    loop.go.set()
    loop.checkpointer.wait()
    found = loop.checkpointer.load(1)
    assert same(found["average"], expected) and torch.equal(found["gradients"]["g"], torch.ones(5))
    loop.checkpointer.close()


def test_after_a_save_and_after_closing_no_step_is_held_back(tmp_path: Path) -> None:
    from torch.optim import optimizer as module

    before = dict(module._global_optimizer_pre_hooks)
    loop = Loop(tmp_path, torch.optim.AdamW)
    for step in range(1, 30):
        loop.step()
        loop.checkpointer.save(step, loop.state)
    loop.checkpointer.close()
    assert dict(module._global_optimizer_pre_hooks) == before
    resumed = Loop(tmp_path, torch.optim.AdamW, lazy=False)
    assert resumed.checkpointer.restore(resumed.state) == 29
    assert same(
        {k: v.state_dict() for k, v in resumed.state.items()}, {k: v.state_dict() for k, v in loop.state.items()}
    )


def test_lazy_needs_the_background(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="background=True"):
        Checkpointer(tmp_path, lazy=True, background=False)
