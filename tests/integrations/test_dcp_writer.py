"""`MilepostWriter` with `dcp.save` and `async_save` in one process: what it writes, refuses, links and survives."""

from __future__ import annotations

import gc
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItemType

from milepost import Checkpointer
from milepost.cli.main import main
from milepost.errors import (
    CheckpointSaveError,
    MisconfigurationException,
    UnencodableValueError,
    UnsafeCheckpointError,
)
from milepost.integrations.dcp import MilepostReader, MilepostStager, MilepostWriter, TrainingState
from milepost.testing import Fault, FaultyStore

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Strange:
    """No data."""


def a_state(value: float = 1.0) -> dict[str, Any]:
    return {
        "model": {"weight": torch.full((3, 4), value), "bias": torch.arange(4.0)},
        "wide": torch.tensor([1 + 2j], dtype=torch.complex128), "turned": torch.arange(6.0).reshape(2, 3).T,
        "none": torch.empty(0, 2), "lr": 0.5, "pair": (1, torch.ones(2)), "mixed": [torch.zeros(2), {"n": 1}],
        "path": Path("/data"), "bytes": b"\0\1", "nan": float("inf"), "ids": [1, [2]],
    }  # fmt: skip


def assert_same(made: Any, state: Any) -> None:
    if isinstance(state, torch.Tensor):
        torch.testing.assert_close(made, state, rtol=0, atol=0)
    elif isinstance(state, dict):
        assert list(made) == list(state)
        for key, value in state.items():
            assert_same(made[key], value)
    elif isinstance(state, (list, tuple)):
        assert type(made) is type(state) and len(made) == len(state)
        for one, other in zip(made, state, strict=True):
            assert_same(one, other)
    else:
        assert made == state and type(made) is type(state)


def failure(caught: Any) -> BaseException:
    (found,) = caught.value.failures.values()
    error: BaseException = found[0]
    return error


def test_what_dcp_saves_is_a_checkpoint_and_nothing_is_pickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unpickled: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        for module, name in ((torch, "save"), (pickle, "dump"), (pickle, "dumps"), (torch, "load"), (pickle, "load")):
            patched.setattr(module, name, lambda *_, **__: pytest.fail("it pickles"))
        dcp.save(a_state(), storage_writer=MilepostWriter(tmp_path / "step-00000007", metrics={"loss": 0.25}))
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [7]
        assert_same(checkpointer.load(7), a_state())
    assert unpickled == []
    assert main(["verify", str(tmp_path)]) == 0
    capsys.readouterr()
    main(["ls", str(tmp_path), "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["form"], row["step"], row["metrics"]) == ("directory", 7, {"loss": 0.25})


def test_what_cannot_be_data_is_refused_by_its_key_path_or_pickled_on_demand(tmp_path: Path) -> None:
    state = {"a": {"b": [1, Strange()]}}
    with pytest.raises(CheckpointException) as caught:
        dcp.save(state, storage_writer=MilepostWriter(tmp_path / "one"))
    error = failure(caught)
    assert isinstance(error, UnencodableValueError) and error.key_path == "a.b.1"
    del caught, error
    assert not (tmp_path / "one").exists()
    with pytest.warns(UserWarning, match=r"a\.b\.1.*pickled"):
        dcp.save(state, storage_writer=MilepostWriter(tmp_path / "one", allow_pickle=True))
    with pytest.raises(CheckpointException) as caught:
        dcp.load({"a": {"b": None}}, storage_reader=MilepostReader(tmp_path / "one"))
    assert isinstance(failure(caught), UnsafeCheckpointError)
    loaded: dict[str, Any] = {"a": {"b": None}}
    dcp.load(loaded, storage_reader=MilepostReader(tmp_path / "one", unpickle=True))
    assert isinstance(loaded["a"]["b"][1], Strange)


def test_what_did_not_change_is_linked(tmp_path: Path) -> None:
    state = {"model": {"base": torch.randn(300_000), "head": torch.zeros(1000)}, "n": 1}
    for step in (1, 2, 3):
        dcp.save(state, checkpoint_id=tmp_path / f"step-{step}", storage_writer=MilepostWriter())
        state["model"]["head"] += 1 if step == 2 else 0
    files = [{path.stat().st_ino for path in (tmp_path / f"step-{n}").glob("*.safetensors")} for n in (1, 2, 3)]
    assert files[0] == files[1] and files[1] < files[2]
    loaded = {"model": {"base": torch.zeros(300_000), "head": torch.ones(1000)}}
    dcp.load(loaded, storage_reader=MilepostReader(tmp_path / "step-3"))
    assert_same(loaded["model"], state["model"])


def weight_in(path: Path) -> float:
    state = {"model": {"weight": torch.zeros(3, 4)}}
    dcp.load(state, storage_reader=MilepostReader(path))
    return float(state["model"]["weight"].unique())  # of one value: nothing is torn


def test_a_failure_at_any_call_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "last"
    dcp.save(a_state(0.0), storage_writer=MilepostWriter(path))
    here, failed = 0.0, 0
    for number in range(1, 1000):
        store = FaultyStore(Fault(at=number - 1))
        try:
            dcp.save(a_state(float(number)), storage_writer=MilepostWriter(path, store=store))
            here = float(number)
        except CheckpointException as error:
            ((found, _),) = error.failures.values()
            assert isinstance(found, CheckpointSaveError) and str(path) in str(found)
            failed += 1
            del found
        assert weight_in(path) == here
        if store.failed is None:
            break
    assert failed > 15
    gc.collect()  # the errors, and the writers that they hold
    dcp.save(a_state(), storage_writer=MilepostWriter(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["last"]


def test_containers_that_a_planner_does_not_flatten_come_back_whole(tmp_path: Path) -> None:
    state = {"a": {"x": 1, "w": torch.ones(2)}, "l": [torch.zeros(1)], "w": torch.arange(3)}
    planner = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(state, storage_writer=MilepostWriter(tmp_path / "one"), planner=planner)
    loaded: dict[str, Any] = {"a": None, "l": None, "w": torch.zeros(3, dtype=torch.int64)}
    reader = MilepostReader(tmp_path / "one")
    dcp.load(loaded, storage_reader=reader, planner=DefaultLoadPlanner(flatten_state_dict=False))
    assert_same(loaded, state)


class Halved(DefaultSavePlanner):
    """As the example in DCP's own pages: other bytes than those of the state."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        for item in plan.items:
            if item.tensor_data is not None:
                item.tensor_data.properties.dtype = torch.float16
        return plan

    def resolve_data(self, write_item: Any) -> Any:
        found = super().resolve_data(write_item)
        return found if write_item.type == WriteItemType.BYTE_IO else found.to(torch.float16)


class Raw(DefaultSavePlanner):
    def transform_object(self, write_item: Any, object: Any) -> Any:
        return io.BytesIO(b"mine") if write_item.type == WriteItemType.BYTE_IO else object


def test_planners_that_change_what_is_saved(tmp_path: Path) -> None:
    state = {"w": torch.tensor([1.5, 2.5]), "n": 7}
    dcp.save(state, storage_writer=MilepostWriter(tmp_path / "one"), planner=Halved())
    loaded = {"w": torch.zeros(2), "n": 0}
    dcp.load(loaded, storage_reader=MilepostReader(tmp_path / "one"))
    assert_same(loaded, state)
    assert sum(path.stat().st_size for path in (tmp_path / "one").glob("*.safetensors")) < 200
    with pytest.raises(CheckpointException) as caught:
        dcp.save(state, storage_writer=MilepostWriter(tmp_path / "two"), planner=Raw())
    assert isinstance(failure(caught), UnencodableValueError)


def test_ranks_that_save_by_themselves_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="use_collectives"):
        dcp.save({"n": 1}, storage_writer=MilepostWriter(tmp_path / "one"), use_collectives=False)


def test_tied_tensors_are_stored_once_and_load_into_both(tmp_path: Path) -> None:
    shared = torch.randn(1000)
    dcp.save({"model": {"a": shared, "b": shared}}, storage_writer=MilepostWriter(tmp_path / "one"))
    assert (tmp_path / "one" / "model.safetensors").stat().st_size < 4500
    loaded = {"model": {"a": torch.zeros(1000), "b": torch.zeros(1000)}}
    dcp.load(loaded, storage_reader=MilepostReader(tmp_path / "one"))
    assert torch.equal(loaded["model"]["a"], shared) and torch.equal(loaded["model"]["b"], shared)


def test_what_is_saved_in_the_background_is_the_state_of_that_moment(tmp_path: Path) -> None:
    stager = MilepostStager()
    for number, options in enumerate(({}, {"async_stager": stager}, {"async_stager": stager})):
        state = a_state(float(number))
        future = dcp.async_save(state, storage_writer=MilepostWriter(tmp_path / f"step-{number}"), **options)
        state["model"]["weight"].zero_()
        state["mixed"].append("later")
        future.result()
        assert weight_in(tmp_path / f"step-{number}") == number
    stager.close()


def test_huggingface_reads_the_weights(tmp_path: Path) -> None:
    weights = {"layer.weight": torch.randn(3, 4), "layer.bias": torch.zeros(3)}
    dcp.save(weights, storage_writer=MilepostWriter(tmp_path / "one"))
    loaded = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    dcp.load(loaded, storage_reader=HuggingFaceStorageReader(str(tmp_path / "one")))
    assert_same(loaded, weights)


class Counting(TrainingState):
    """What a user adds to it."""

    step = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict.pop("step")
        super().load_state_dict(state_dict)


def counting() -> Counting:
    model = torch.nn.Linear(3, 2)
    return Counting(model, torch.optim.AdamW(model.parameters(), lr=0.1))


def test_a_training_state_goes_on_through_dcp_and_through_a_checkpointer(tmp_path: Path) -> None:
    def train(run: Counting) -> torch.Tensor:
        run.model(torch.ones(2, 3)).sum().backward()
        run.optimizers[0].step()
        run.optimizers[0].zero_grad()
        run.step += 1
        return run.model.weight.detach().clone()

    run = counting()
    train(run)
    dcp.save({"training": run}, storage_writer=MilepostWriter(tmp_path / "step-1"))
    with Checkpointer(tmp_path / "ours") as checkpointer:
        checkpointer.save(1, {"training": run}, wait=True)
    expected = train(run)
    other = counting()
    dcp.load({"training": other}, storage_reader=MilepostReader(tmp_path / "step-1"))
    assert other.step == 1 and torch.equal(train(other), expected)
    third = counting()
    with Checkpointer(tmp_path / "ours") as checkpointer:
        assert checkpointer.restore({"training": third}) == 1
    assert third.step == 1 and torch.equal(train(third), expected)
