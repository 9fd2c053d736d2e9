"""Lazy staging: the snapshot is of the moment of `save`, whichever way the next step changes the tensors.

Each late copy is compared with one made at once (`MILEPOST_CHECK_LAZY=1`), beside what the tests compare themselves.
"""

from __future__ import annotations

import copy
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from milepost import Checkpointer
from milepost.engine.lazy import changed_by_steps, steps_alone_change
from milepost.errors import CheckpointSaveError, MisconfigurationException


@pytest.fixture(autouse=True)
def compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILEPOST_CHECK_LAZY", "1")


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


def test_a_replaced_step_is_not_vouched_for_also_under_a_scheduler() -> None:
    model = nn.Linear(2, 2)

    def custom(self: torch.optim.Optimizer, closure: Any = None) -> None:
        model.weight.data.zero_()  # no hook of torch's sees it

    optimizer, replaced = torch.optim.SGD(model.parameters()), torch.optim.SGD(model.parameters())
    replaced.step = types.MethodType(custom, replaced)  # type: ignore[method-assign]
    for _ in range(2):  # without and with the step that a scheduler puts around it
        assert steps_alone_change(optimizer) and not steps_alone_change(replaced)
        for one in (optimizer, replaced):
            torch.optim.lr_scheduler.StepLR(one, 1)
    assert changed_by_steps([replaced]) == {} and len(changed_by_steps([optimizer])) == 2


def test_lazy_needs_the_background(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="background=True"):
        Checkpointer(tmp_path, lazy=True, background=False)


# ---- steps that are given a closure ----------------------------------------------------------------------------------

TORCH = [
    kind
    for name in dir(torch.optim)
    if isinstance(kind := getattr(torch.optim, name), type) and issubclass(kind, torch.optim.Optimizer)
]


def tensors_of(state: Any) -> Any:
    return [[v for v in one.values() if isinstance(v, torch.Tensor)] for one in state.values()] or [[]]


@pytest.mark.parametrize("kind", [k for k in TORCH if k is not torch.optim.Optimizer])
def test_every_optimizer_of_torch_calls_its_closure_before_it_changes_anything(kind: Any) -> None:
    """What the gate relies on, where it waits at the end of the closure and not before the step."""
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = kind([weight], lr=0.1)
    seen: list[Any] = []

    def state() -> Any:
        return copy.deepcopy([weight.detach(), optimizer.state_dict()["state"]])

    def closure() -> torch.Tensor:
        seen.append(state())
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        if kind is torch.optim.SparseAdam:
            weight.grad = weight.grad.to_sparse()  # type: ignore[union-attr]
        return loss.detach()

    for _ in range(2):
        before = state()
        optimizer.step(closure)
        first = seen[0]
        if kind is torch.optim.LBFGS:  # has begun to count its calls: plain numbers, which are copied at once
            first = [
                first[0],
                {n: {k: v for k, v in s.items() if k in before[1].get(n, {})} for n, s in first[1].items()},
            ]
            before = [before[0], {n: before[1].get(n, {}) for n in first[1]}]
        assert same(first, before)
        assert not same(state()[0], before[0])
        seen.clear()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_step_with_a_closure_waits_at_its_end_so_that_the_copy_overlaps_it(tmp_path: Path, name: str) -> None:
    loop = Loop(tmp_path, OPTIMIZERS[name])
    loop.optimizer.step(loop.forward_and_backward)
    loop.hold_up_the_copying()
    expected = copy.deepcopy({k: v.state_dict() for k, v in loop.state.items()})
    handle = loop.checkpointer.save(1, loop.state)
    inside: list[bool] = []

    def closure() -> torch.Tensor:
        inside.append(handle.staging is not None and not handle.staging.done())
        loss = loop.forward_and_backward()
        loop.go.set()
        return loss

    loop.optimizer.step(closure)
    assert inside[0], "the closure ran while the copy was held up"
    loop.checkpointer.wait()
    assert same(loop.checkpointer.load(1), expected)
    loop.checkpointer.close()


def test_a_save_out_of_a_closure_is_copied_at_once(tmp_path: Path) -> None:
    loop = Loop(tmp_path, torch.optim.AdamW)
    expected: list[Any] = []

    def closure() -> torch.Tensor:
        loss = loop.forward_and_backward()
        expected.append(copy.deepcopy(loop.model.state_dict()))
        assert loop.checkpointer.save(1, loop.state).staging is None
        return loss

    loop.optimizer.step(closure)
    loop.checkpointer.wait()
    assert same(loop.checkpointer.load(1)["model"], expected[0])
    loop.checkpointer.close()


# ---- what goes on between a save and a step -------------------------------------------------------------------------


def test_clipping_accumulation_and_averages_change_nothing_of_it(tmp_path: Path) -> None:
    loop = Loop(tmp_path, torch.optim.AdamW)
    average = AveragedModel(loop.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    state = {**loop.state, "average": average}
    expected = {}
    for step in range(1, 13):
        loss = loop.model(torch.randn(4, 8)).square().sum()
        loss.backward()  # gradients of three batches add up, and there is a save after each
        if step % 3 == 0:
            nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            average.update_parameters(loop.model)
        gradients = {name: p.grad for name, p in loop.model.named_parameters() if p.grad is not None}
        saved = {**state, "gradients": gradients}
        expected[step] = copy.deepcopy({k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in saved.items()})
        loop.checkpointer.save(step, saved)
    loop.checkpointer.wait()
    for step, one in expected.items():
        assert same(loop.checkpointer.load(step), one), step
    loop.checkpointer.close()


def test_a_buffer_that_begins_with_a_parameter_is_copied_at_once(tmp_path: Path) -> None:
    flat = torch.zeros(10)
    weight = nn.Parameter(flat[:4])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    checkpointer, go = Checkpointer(tmp_path, lazy=True, threads=1), threading.Event()
    checkpointer._engine._started().pool.submit(go.wait)
    checkpointer.save(1, {"flat": flat, "optimizer": optimizer})
    flat[4:] = 7
    go.set()
    checkpointer.wait()
    assert checkpointer.load(1)["flat"].tolist() == [0] * 10
    checkpointer.close()


# ---- who writes all the same is found out ---------------------------------------------------------------------------


def write_by_data(weight: torch.Tensor) -> None:
    weight.data.mul_(2)


def write_in_place(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.mul_(2)


@pytest.mark.parametrize(
    ("write", "compared"), [(write_by_data, True), (write_in_place, True), (write_in_place, False)]
)
def test_a_write_between_save_and_step_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, compared: bool
) -> None:
    monkeypatch.setenv("MILEPOST_CHECK_LAZY", "1" if compared else "0")
    loop = Loop(tmp_path, torch.optim.AdamW)
    loop.step()
    loop.checkpointer.save(1, loop.state, wait=True)
    loop.hold_up_the_copying()
    handle = loop.checkpointer.save(2, loop.state)
    write(loop.model[2].weight)
    loop.go.set()
    loop.step()
    with pytest.raises(CheckpointSaveError, match=r"'model\.2\.weight' was written to") as caught:
        handle.result()
    assert caught.value.step == 2 and caught.value.path == str(tmp_path / "step-00000002")
    assert loop.checkpointer.steps() == [1]
    loop.checkpointer.save(3, loop.state, wait=True)
    assert loop.checkpointer.steps() == [1, 3]
    loop.checkpointer.close()


def test_who_waits_for_the_copy_may_write(tmp_path: Path) -> None:
    loop = Loop(tmp_path, torch.optim.AdamW)
    expected = copy.deepcopy(loop.model.state_dict())
    loop.checkpointer.save(1, loop.state).staged()
    write_by_data(loop.model[2].weight)
    loop.checkpointer.wait()
    assert same(loop.checkpointer.load(1)["model"], expected)
    loop.checkpointer.close()
