"""Staging from GPUs and loading into them. Needs CUDA; what is asked of a device is tried without one elsewhere.

pytest tests/gpu
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from milepost import Checkpointer
from milepost.errors import CheckpointSaveError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA, and there is none")


class Loop:
    """A model whose forward keeps the GPU busy, so that copies that do not wait for it would be torn."""

    def __init__(self, folder: Path, lazy: bool, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)), nn.BatchNorm1d(1024)).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, **options)
        self.state = {"model": self.model, "optimizer": self.optimizer}
        self.checkpointer = Checkpointer(folder, lazy=lazy)

    def step(self) -> None:
        for _ in range(10):
            self.optimizer.zero_grad()
            self.model(torch.randn(512, 1024, device="cuda")).square().mean().backward()
        self.optimizer.step()

    def copied(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[k].cpu(), v.cpu()) for k, v in expected.items())


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}, {"capturable": True}])
@pytest.mark.parametrize("lazy", [False, True])
def test_each_save_is_of_its_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazy: bool, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("MILEPOST_CHECK_LAZY", "1")
    loop = Loop(tmp_path, lazy, **options)
    expected = {}
    for step in range(1, 6):
        loop.step()
        expected[step] = loop.copied()
        loop.checkpointer.save(step, loop.state)
    loop.step()
    loop.checkpointer.wait()
    for step, weights in expected.items():
        assert same(loop.checkpointer.load(step)["model"], weights), step
    loop.checkpointer.close()


def test_a_lazy_save_and_the_step_after_it_do_not_wait_for_the_gpu(tmp_path: Path) -> None:
    loop = Loop(tmp_path, lazy=True)
    loop.step()
    loop.checkpointer.save(1, loop.state, wait=True)  # memory is there and pinned
    loop.step()
    busy = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second of the GPU's
    busy.record()
    loop.checkpointer.save(2, loop.state)
    loop.optimizer.step()
    assert not busy.query(), "the host has come here while the GPU had not even begun to copy"
    loop.checkpointer.close()


def test_the_memory_is_pinned(tmp_path: Path) -> None:
    loop = Loop(tmp_path, lazy=False)
    loop.checkpointer.save(1, loop.state, wait=True)
    memory = loop.checkpointer._engine._arena._memory
    assert memory is not None and torch.frombuffer(memory.bytes, dtype=torch.uint8).is_pinned()
    loop.checkpointer.close()


def test_a_write_before_the_step_fails_the_save(tmp_path: Path) -> None:
    loop = Loop(tmp_path, lazy=True)
    loop.step()
    torch.cuda._sleep(1_000_000_000)
    handle = loop.checkpointer.save(1, loop.state)
    with torch.no_grad():
        loop.model[0].weight.mul_(2)
    loop.step()
    with pytest.raises(CheckpointSaveError, match=r"'model\.0\.weight' was written to"):
        handle.result()
    loop.checkpointer.close()


def test_restoring_puts_all_into_the_gpus_tensors_through_few_pinned_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(tmp_path, lazy=False)
    loop.step()
    loop.checkpointer.save(1, loop.state, wait=True)
    expected = loop.copied()
    moments = [state["exp_avg"].clone() for state in loop.optimizer.state.values()]
    loop.step()
    places = [parameter.data_ptr() for parameter in loop.model.parameters()]
    monkeypatch.setattr("milepost.engine.loading.BOUNCE_BYTES", 8 << 20)
    assert loop.checkpointer.restore(loop.state) == 1
    assert same(loop.copied(), expected) and [p.data_ptr() for p in loop.model.parameters()] == places
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(loop.optimizer.state.values(), moments, strict=True))
    loop.checkpointer.close()
