"""Staging of a device's tensors: what is asked of the device, and when. The device is none: its queues are lists.

What `Cuda` makes of it is tried in tests/gpu, where there is one.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from milepost import Checkpointer
from milepost.engine.device import Transfer
from milepost.engine.memory import Memory
from milepost.engine.reader import StoredCheckpoint
from milepost.engine.snapshot import snapshot
from milepost.engine.staging import Arena
from milepost.errors import CheckpointSaveError


class Fence:
    def __init__(self, device: Device, copies: list[Callable[[], Any]]) -> None:
        self._device = device
        self._copies = copies

    def hold(self) -> None:
        self._device.log.append("hold")
        self._run()  # what comes on the device after this comes after the copies

    def wait(self) -> None:
        self._device.log.append("wait")
        self._run()

    def _run(self) -> None:
        while self._copies:
            self._copies.pop()()


class Device:
    """Takes the tensors of 100 elements and more; copies only when somebody is made to wait for it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.pinned: list[int] = []

    def takes(self, tensor: torch.Tensor) -> bool:
        return tensor.nbytes >= 400 and tensor.is_contiguous()

    def pin(self, memory: Memory) -> None:
        self.pinned.append(memory.address)

    def begin(self, transfers: Sequence[Transfer]) -> Fence:
        self.log.append(f"begin {len(transfers)}")
        return Fence(self, [copy_of(transfer) for transfer in transfers])


def copy_of(transfer: Transfer) -> Callable[[], Any]:
    tensor, address = transfer.tensor, transfer.address
    return lambda: ctypes.memmove(address, tensor.data_ptr(), tensor.nbytes)


class Loop:
    def __init__(self, folder: Path, lazy: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.Linear(20, 10))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.state = {"model": self.model, "optimizer": self.optimizer, "table": torch.zeros(300)}
        self.checkpointer = Checkpointer(folder, lazy=lazy)
        self.device = Device()
        self.checkpointer._engine._arena = Arena(self.device)

    def step(self) -> None:
        self.model(torch.randn(4, 10)).square().sum().backward()
        self.optimizer.step()

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


@pytest.fixture(params=[False, True])
def loop(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Loop]:
    made = Loop(tmp_path, request.param)
    yield made
    made.checkpointer.close()


def test_a_late_copy_is_begun_at_once_and_the_step_is_queued_behind_it_while_the_host_goes_on(tmp_path: Path) -> None:
    loop = Loop(tmp_path, lazy=True)
    loop.step()
    expected = loop.weights()
    hold_up_the_writer(loop)
    handle = loop.checkpointer.save(1, loop.state)
    assert loop.device.log == ["begin 1", "wait", "begin 6"], "the table at once, two weights and their moments later"
    loop.step()
    assert loop.device.log[3:] == ["hold"], "no wait of the host's"
    loop.go()
    handle.result()
    found = loop.checkpointer.load(1)["model"]
    assert all(torch.equal(a, b) for a, b in zip(expected, parameters_of(found), strict=True))
    loop.checkpointer.close()


def parameters_of(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for name, tensor in state.items() if name.endswith(("weight", "bias"))]


def hold_up_the_writer(loop: Any) -> None:
    from threading import Event

    go = Event()
    loop.go = go.set
    loop.checkpointer._engine._started()
    loop.checkpointer._engine._writer.submit(go.wait)


def test_saves_one_after_the_other_are_of_their_moment_and_the_memory_is_pinned_once(loop: Loop) -> None:
    expected = []
    for step in itertools.count(1):
        loop.step()
        expected.append(loop.weights())
        loop.checkpointer.save(step, loop.state)
        if step == 4:
            break
    loop.step()
    loop.checkpointer.wait()
    for step, weights in enumerate(expected, start=1):
        found = loop.checkpointer.load(step)["model"]
        assert all(torch.equal(a, b) for a, b in zip(weights, parameters_of(found), strict=True))
    assert loop.device.pinned == [loop.checkpointer._engine._arena._memory.address]  # type: ignore[union-attr]


@pytest.mark.parametrize("compared", ["0", "1"])
def test_a_write_before_the_step_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: str) -> None:
    monkeypatch.setenv("MILEPOST_CHECK_LAZY", compared)
    loop = Loop(tmp_path, lazy=True)
    loop.step()
    hold_up_the_writer(loop)
    handle = loop.checkpointer.save(1, loop.state)
    if compared == "1":
        loop.model[0].weight.data.mul_(2)  # torch does not count it
    else:
        with torch.no_grad():
            loop.model[0].weight.mul_(2)
    loop.step()
    loop.go()  # type: ignore[attr-defined]
    with pytest.raises(CheckpointSaveError, match=r"'model\.0\.weight' was written to"):
        handle.result()
    loop.checkpointer.close()


def test_a_snapshot_of_a_devices_tensors_for_any_plugin() -> None:
    device = Device()
    arena = Arena(device)
    weight = torch.arange(200.0)
    with ThreadPoolExecutor(2) as threads:
        made, staging = snapshot({"w": weight, "t": weight[:3], "s": torch.ones(3)}, arena, threads, 2)
        assert staging is None and device.log == ["begin 1", "wait"]
        assert torch.equal(made["w"], weight) and made["t"].tolist() == [0, 1, 2] and made["s"].tolist() == [1, 1, 1]
        lazy = {weight.data_ptr(): weight.nbytes}
        made, staging = snapshot({"w": weight, "s": torch.ones(3)}, Arena(device), threads, 2, lazy)
        assert staging is not None and device.log[2:] == ["begin 1"]
        staging.hold()
        weight.zero_()
        assert staging.exception() is None and made["w"].tolist() == list(range(200))


def test_what_bytes_cannot_be_put_into_is_restored_in_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's tensors are; here conjugate ones, which take no bytes either."""
    monkeypatch.setattr("milepost.engine.loading.BOUNCE_BYTES", 1000)
    rounds: list[int] = []
    read = StoredCheckpoint.read
    monkeypatch.setattr(StoredCheckpoint, "read", lambda self, *given: (rounds.append(1), read(self, *given))[1])
    values = {f"v{n}": torch.randn(100, dtype=torch.complex64) for n in range(10)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, values, wait=True)
        live: dict[str, Any] = {name: torch.zeros(100, dtype=torch.complex64).conj() for name in values}
        places = {name: tensor.data_ptr() for name, tensor in live.items()}
        checkpointer.restore(live)
    assert len(rounds) == 6, "two in each, and what is left at the end"
    assert all(torch.equal(live[name].resolve_conj(), value) for name, value in values.items())
    assert {name: tensor.data_ptr() for name, tensor in live.items()} == places
