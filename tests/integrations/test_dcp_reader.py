"""`MilepostReader` with `dcp.load`, on what a `Checkpointer` and DCP itself have saved; and `MilepostStager`."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from milepost import Checkpointer
from milepost.errors import CheckpointCorruptError, CheckpointNotFoundError, UnsafeCheckpointError
from milepost.integrations.dcp import MilepostReader, MilepostStager

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:torch.distributed is unavail")


@dataclass
class Position:
    epoch: int
    where: Path


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    return net, optimizer


def a_state() -> dict[str, Any]:
    net, optimizer = trained()
    return {
        "net": net, "optimizer": optimizer, "step": 3, "position": Position(2, Path("/data")), "ids": [1, 2],
        "pair": (1, torch.arange(3)), "mixed": [torch.ones(2), {"n": 1}], "turned": torch.arange(6.0).reshape(2, 3).T,
        "wide": torch.tensor([1 + 2j, 3], dtype=torch.complex128), "none": torch.empty(0, 2),
    }  # fmt: skip


def blank(state: dict[str, Any]) -> dict[str, Any]:
    """The same structure with nothing in it."""
    net, optimizer = state["net"], copy.deepcopy(state["optimizer"].state_dict())
    fresh = copy.deepcopy(net)
    for tensor in (*fresh.state_dict().values(), *(t for s in optimizer["state"].values() for t in s.values())):
        tensor.zero_()
    others = {k: torch.zeros_like(v) for k, v in state.items() if isinstance(v, torch.Tensor)}
    return {
        "net": fresh, "optimizer": optimizer, "step": 0, "position": None, "ids": [], "pair": None,
        "mixed": [torch.zeros(2), {"n": 0}], **others,
    }  # fmt: skip


def assert_same(made: dict[str, Any], state: dict[str, Any]) -> None:
    torch.testing.assert_close(made["net"].state_dict(), state["net"].state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(made["optimizer"], state["optimizer"].state_dict(), rtol=0, atol=0)
    assert made["position"] == state["position"] and (made["step"], made["ids"]) == (3, [1, 2])
    assert made["pair"][0] == 1 and torch.equal(made["pair"][1], torch.arange(3)) and made["mixed"][1] == {"n": 1}
    for name in ("turned", "wide", "none"):
        assert torch.equal(made[name], state[name])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, a_state(), wait=True)
        return checkpointer.path(3)


def test_dcp_loads_what_a_checkpointer_saved_and_nothing_is_unpickled(
    saved: Path, unpickled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = a_state()
    into = blank(state)
    weight = into["net"][0].weight
    with monkeypatch.context() as patched:
        for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads")):
            patched.setattr(module, name, lambda *_, **__: pytest.fail("it unpickles"))
        dcp.load(into, storage_reader=MilepostReader(saved))
    assert_same(into, state)
    assert into["net"][0].weight is weight and unpickled == []


def test_dcp_loads_through_it_what_dcp_saved(tmp_path: Path) -> None:
    state = {**a_state(), "position": "text"}
    dcp.save({**state, "optimizer": state["optimizer"].state_dict()}, checkpoint_id=tmp_path / "theirs")
    into = blank(state)
    dcp.load(into, checkpoint_id=tmp_path / "theirs", storage_reader=MilepostReader())
    assert_same(into, state)
    dcp.save({"strange": object}, checkpoint_id=tmp_path / "pickled")
    with pytest.raises(CheckpointException) as caught:
        dcp.load({"strange": None}, storage_reader=MilepostReader(tmp_path / "pickled"))
    (failure,) = caught.value.failures.values()
    assert isinstance(failure[0], UnsafeCheckpointError) and failure[0].key_path == "strange"
    loaded: dict[str, Any] = {"strange": None}
    dcp.load(loaded, storage_reader=MilepostReader(tmp_path / "pickled", unpickle=True))
    assert loaded["strange"] is object


def test_an_empty_state_is_filled_with_all_or_with_some_keys(saved: Path) -> None:
    everything = _load_state_dict_from_keys(storage_reader=MilepostReader(saved))
    assert torch.equal(everything["net"]["0.weight"], a_state()["net"][0].weight) and everything["step"] == 3
    assert set(_load_state_dict_from_keys({"net", "step"}, storage_reader=MilepostReader(saved))) == {"net", "step"}


def test_what_is_not_there_is_refused_or_left_alone(saved: Path) -> None:
    with pytest.raises(CheckpointException, match=r"Missing key.*extra"):
        dcp.load({"step": 0, "extra": 7}, storage_reader=MilepostReader(saved))
    into = {"step": 0, "extra": 7}
    dcp.load(into, storage_reader=MilepostReader(saved), planner=DefaultLoadPlanner(allow_partial_load=True))
    assert into == {"step": 3, "extra": 7}


def test_a_planner_with_its_own_way_of_taking_values_gets_the_bytes_it_expects(saved: Path) -> None:
    class Own(DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            self.original_state_dict[read_item.dest_index.fqn] = ("own", torch.load(value, weights_only=False))

    into: dict[str, Any] = {"step": 0}
    dcp.load(into, storage_reader=MilepostReader(saved), planner=Own())
    assert into == {"step": ("own", 3)}


def test_tensors_of_another_type_or_layout_are_converted(saved: Path) -> None:
    into = {"turned": torch.zeros(3, 2, dtype=torch.float64), "wide": torch.zeros(4, dtype=torch.complex128)[::2]}
    dcp.load(into, storage_reader=MilepostReader(saved))
    assert torch.equal(into["turned"], a_state()["turned"].double())
    assert torch.equal(into["wide"], a_state()["wide"])


def test_damage_is_named_and_a_missing_one_not_found(saved: Path) -> None:
    blob = saved / "rest.safetensors"
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    with pytest.raises(CheckpointException) as caught:
        dcp.load(blank(a_state()), storage_reader=MilepostReader(saved))
    (failure,) = caught.value.failures.values()
    assert isinstance(failure[0], CheckpointCorruptError) and "rest.safetensors" in str(failure[0])
    with pytest.raises(CheckpointException) as caught:
        dcp.load({"step": 0}, storage_reader=MilepostReader(saved.parent / "nothing"))
    (failure,) = caught.value.failures.values()
    assert isinstance(failure[0], CheckpointNotFoundError)


def test_what_is_staged_does_not_change_with_the_state_and_its_memory_is_used_again() -> None:
    net, optimizer = trained()
    tied = torch.arange(8.0)
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "tied": [tied, tied], "text": ["a"]}
    expected = copy.deepcopy(state)
    stager = MilepostStager()
    assert stager.prepare(state) > 0
    staged = stager.stage(state)
    for tensor in (*net.state_dict().values(), tied):
        tensor.zero_()
    state["text"].append("b")
    assert staged.pop("text") == expected.pop("text") == ["a"]
    torch.testing.assert_close(staged, expected, rtol=0, atol=0)
    first, second = staged["tied"]
    assert first is not tied and first.data_ptr() == second.data_ptr()
    other = stager.stage(state)  # the first is still held: other memory
    assert other["tied"][0].data_ptr() != first.data_ptr() and torch.equal(first, torch.arange(8.0))
    address = first.data_ptr()
    del staged, first, second
    assert stager.stage(state)["tied"][0].data_ptr() == address
    stager.close()
