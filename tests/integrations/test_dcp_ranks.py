"""`dcp.save`, `async_save` and `load` with Milepost's storage on several ranks, with FSDP2 models."""

from __future__ import annotations

import gc
import logging
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import torchtitan_way as way
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from milepost import PerRank
from milepost.cli.main import main
from milepost.engine.directory import DirectoryEngine
from milepost.errors import CheckpointCorruptError, UnencodableValueError
from milepost.integrations.dcp import MilepostReader, MilepostSavePlanner, MilepostStager, MilepostWriter
from milepost.storage.store import LocalStore

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1))


class Run:
    """A sharded model and its optimizer, trained a little, and what is not sharded beside it."""

    def __init__(self, steps: int) -> None:
        self.net = fully_shard(net(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.1)
        self.extra = torch.arange(5.0)
        self.train(steps)

    def train(self, steps: int) -> None:
        for step in range(steps):
            self.net(torch.full((2, 7), float(step))).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        optimizer = get_optimizer_state_dict(self.net, self.optimizer)
        return {"model": self.net.state_dict(), "optimizer": optimizer, "extra": self.extra, "n": (3, "a")}

    def load(self, path: Path) -> dict[str, Any]:
        state = self.state()
        state["n"] = None
        dcp.load(state, storage_reader=MilepostReader(path))
        self.net.load_state_dict(state["model"])
        set_optimizer_state_dict(self.net, self.optimizer, state["optimizer"])
        return state


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """With the whole of each sharded tensor, on every rank."""

    def visit(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: visit(item) for key, item in value.items()}
        return (
            value.full_tensor() if isinstance(value, DTensor) else value.clone() if hasattr(value, "clone") else value
        )

    made: dict[str, Any] = visit(state)
    return made


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    torch.testing.assert_close(one["model"], other["model"], rtol=0, atol=0)
    torch.testing.assert_close(one["optimizer"]["state"], other["optimizer"]["state"], rtol=0, atol=0)
    assert torch.equal(one["extra"], other["extra"]) and one["n"] == (3, "a") == other["n"]


def start(rank: int, ranks: int, folder: str, program: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/{program}.store", rank=rank, world_size=ranks)
    PROGRAMS[program](Path(folder))
    dist.destroy_process_group()


def launch(ranks: int, folder: Path, program: str) -> None:
    mp.spawn(start, (ranks, str(folder), program), nprocs=ranks)


# ---- what two ranks do -----------------------------------------------------------------------------------------------


def save_in_every_way(folder: Path) -> None:
    run = Run(2)
    expected = whole(run.state())
    if dist.get_rank() == 0:
        torch.save(expected, folder / "expected.pt")
    dcp.save(run.state(), storage_writer=MilepostWriter(folder / "step-2", metrics={"loss": 0.5}))
    dcp.save(run.state(), checkpoint_id=folder / "theirs")
    for path in ("step-2", "theirs"):
        other = Run(0)
        assert_same(whole(other.load(folder / path)), expected)
        assert_same(whole(other.state() | {"n": (3, "a")}), expected)
    plans_that_are_kept(run, folder)
    split_by_bytes(run, folder)
    what_each_rank_has(folder)
    in_the_background(run, folder)
    failures(run, folder)


def plans_that_are_kept(run: Run, folder: Path) -> None:
    """With cached plans a rank hears nothing from the coordinator before the end."""
    writer = MilepostWriter()
    for step in (3, 4, 5):
        run.train(1)
        planner = DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(run.state(), checkpoint_id=folder / f"step-{step}", storage_writer=writer, planner=planner)
        assert_same(whole(Run(0).load(folder / f"step-{step}")), whole(run.state()))


def split_by_bytes(run: Run, folder: Path) -> None:
    """A tensor that both ranks hold is cut between them, whoever writes."""
    torch.manual_seed(1)
    own = {f"of_rank_{dist.get_rank()}": dist.get_rank()}
    state = run.state() | {"large": torch.randn(1001, 100), **own}
    expected = whole(state)
    for name, writer in (("ours", MilepostWriter), ("by-theirs", dcp.FileSystemWriter)):
        path = folder / f"split-{name}"
        dcp.save(state, storage_writer=writer(path), planner=MilepostSavePlanner())
        sizes = [file.stat().st_size for file in [*path.glob("*.safetensors"), *path.glob("*.distcp")]]
        assert sum(sizes) > 400_000 and max(sizes) < 0.6 * sum(sizes)
        loaded = Run(0).state() | {"large": torch.zeros(1001, 100), "n": None, **dict.fromkeys(own)}
        dcp.load(loaded, storage_reader=MilepostReader(path))
        assert_same(whole(loaded), expected)
        assert torch.equal(loaded["large"], state["large"]) and own.items() <= loaded.items()
    with pytest.raises(CheckpointException, match="different tensors"):
        odd = {"w": torch.zeros(2 + dist.get_rank())}
        dcp.save(odd, storage_writer=MilepostWriter(folder / "odd"), planner=MilepostSavePlanner())


def what_each_rank_has(folder: Path) -> None:
    """A `PerRank` value is saved by every rank, and each gets its own back, another number of ranks all of them."""
    rank = dist.get_rank()
    own = {"seed": 10 + rank, "state": torch.full((3,), float(rank))}
    state = {"w": torch.ones(2), "rng": PerRank(own), "deep": {"n": PerRank(rank)}}
    dcp.save(state, storage_writer=MilepostWriter(folder / "own"))
    loaded: dict[str, Any] = {"w": torch.zeros(2), "rng": None, "deep": {"n": None}}
    dcp.load(loaded, storage_reader=MilepostReader(folder / "own"))
    assert loaded["rng"]["seed"] == 10 + rank and torch.equal(loaded["rng"]["state"], own["state"])
    assert loaded["deep"] == {"n": rank}
    for odd in ({"pair": (PerRank(1), 2)}, {f"own_{rank}": PerRank(1)}):
        with pytest.raises(CheckpointException, match="PerRank"):
            dcp.save({"n": PerRank(0), **odd}, storage_writer=MilepostWriter(folder / "odd"))


def in_the_background(run: Run, folder: Path) -> None:
    group = dist.new_group(backend="gloo")
    stager = MilepostStager()
    for number, options in enumerate(({}, {"async_stager": stager}, {"async_stager": stager})):
        expected = whole(run.state())
        future = dcp.async_save(
            run.state(), storage_writer=MilepostWriter(folder / f"async-{number}"), process_group=group, **options
        )
        with torch.no_grad():
            for parameter in run.net.parameters():
                parameter.add_(1)
        future.result()
        assert_same(whole(Run(0).load(folder / f"async-{number}")), expected)
    stager.close()


def failures(run: Run, folder: Path) -> None:
    """An error of one rank is one on all, and what was there stays; what was written for it is swept."""
    before = whole(Run(0).load(folder / "step-2"))
    for store, strange, kind in ((Full(), {}, OSError), (None, {"strange": object()}, UnencodableValueError)):
        failing_save(run.state() | strange, folder / "step-2", store if dist.get_rank() == 1 else None, kind)
        assert_same(whole(Run(0).load(folder / "step-2")), before)
    gc.collect()  # a rank that has not failed holds what it wrote until its writer is used again or is gone
    dcp.save(run.state(), storage_writer=MilepostWriter(folder / "last"))
    dist.barrier()
    assert not [path for path in folder.iterdir() if path.name.startswith(".pending")]


def failing_save(state: dict[str, Any], path: Path, store: Any, kind: type[Exception]) -> None:
    with pytest.raises(CheckpointException) as caught:
        dcp.save(state, storage_writer=MilepostWriter(path, store=store))
    assert all(isinstance(error, kind) for error, _ in caught.value.failures.values())


class Full(LocalStore):
    """A disk without room."""

    def write(self, descriptor: int, data: memoryview, offset: int) -> None:
        raise OSError(28, "No space left on device")


def load_on_three(folder: Path) -> None:
    expected = torch.load(folder / "expected.pt")
    for path in ("step-2", "theirs"):
        run = Run(0)
        run.load(folder / path)
        assert_same(whole(run.state()), expected)


class Killed(LocalStore):
    """The machine loses this process when it has written its blobs."""

    def finish(self, descriptor: int, size: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def a_rank_is_killed(folder: Path) -> None:
    run = Run(1)
    dcp.save(run.state(), storage_writer=MilepostWriter(folder / "step-1"))
    run.train(1)
    store = Killed() if dist.get_rank() == 1 else None
    dcp.save(run.state(), storage_writer=MilepostWriter(folder / "step-1", store=store))


def as_torchtitan_does(folder: Path) -> None:
    def made() -> tuple[Run, dict[str, Any]]:
        run = Run(0)
        parts = [run.net]
        states = {
            "model": way.ModelWrapper(parts), "optimizer": way.OptimizersContainer(parts, [run.optimizer]),
            "dataloader": way.DataLoader(), "train_state": way.TrainState(),
        }  # fmt: skip
        return run, states

    run, states = made()
    manager = way.CheckpointManager(folder / "titan", states)
    for step, mode in enumerate(("sync", "async", "async", "staged", "staged"), 1):
        run.train(1)
        states["dataloader"].position = 10 * step + dist.get_rank()
        states["train_state"].step = step
        states["train_state"].losses.append(step / 3)
        manager.save(step, mode)
    manager.wait()
    expected = whole(run.state())
    assert manager.steps() == [4, 5]
    run, states = made()
    run.train(1)
    manager = way.CheckpointManager(folder / "titan", states)
    assert manager.load() == 5
    assert_same(whole(run.state()), expected)
    assert states["dataloader"].position == 50 + dist.get_rank()
    assert (states["train_state"].step, states["train_state"].losses) == (5, [n / 3 for n in range(1, 6)])
    weights = manager.load_weights(4)
    assert weights["new.weight"].tolist() == [7, 7] and not torch.equal(
        weights["0.weight"].full_tensor(), expected["model"]["0.weight"]
    )


def in_another_process(folder: Path) -> None:
    """The writer, and what a stager has copied, go to a process that DCP starts."""
    logging.disable(logging.INFO)
    stager = MilepostStager()
    state = {"w": torch.arange(100.0), "n": 1}
    for number, options in enumerate(({}, {"async_stager": stager})):
        expected = state["w"].clone()
        future = dcp.async_save(
            state, storage_writer=MilepostWriter(folder / f"step-{number}"),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS, **options,
        )  # fmt: skip
        state["w"] += 1
        future.result()
        loaded = {"w": torch.zeros(100), "n": 0}
        dcp.load(loaded, storage_reader=MilepostReader(folder / f"step-{number}"))
        assert torch.equal(loaded["w"], expected) and loaded["n"] == 1
    stager.close()


PROGRAMS: dict[str, Callable[[Path], None]] = {
    "save_in_every_way": save_in_every_way,
    "load_on_three": load_on_three,
    "a_rank_is_killed": a_rank_is_killed,
    "as_torchtitan_does": as_torchtitan_does,
    "in_another_process": in_another_process,
}


# ---- the tests -------------------------------------------------------------------------------------------------------


def alone(path: Path) -> dict[str, Any]:
    """What one process without a process group loads into an ordinary model."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 7)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer),
        "extra": torch.zeros(5), "n": None,
    }  # fmt: skip
    dcp.load(state, storage_reader=MilepostReader(path))
    return state


@pytest.mark.timeout(300)
def test_torchtitans_way_of_calling_dcp(tmp_path: Path) -> None:
    (tmp_path / "titan").mkdir()
    launch(2, tmp_path, "as_torchtitan_does")
    engine = DirectoryEngine()
    state = engine.load(tmp_path / "titan" / "step-5")
    engine.close()
    assert state["0.weight"].shape == (30, 7)
    assert state["optimizer"]["state.0.weight.exp_avg"].shape == (30, 7)
    assert set(state["dataloader"]) == {"dp_rank_0", "dp_rank_1", "world_size"}


@pytest.mark.timeout(300)
def test_a_save_in_another_process(tmp_path: Path) -> None:
    launch(1, tmp_path, "in_another_process")
    assert main(["verify", str(tmp_path / "step-0"), str(tmp_path / "step-1")]) == 0


@pytest.mark.timeout(300)
def test_two_ranks_save_and_one_two_and_three_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch(2, tmp_path, "save_in_every_way")
    launch(3, tmp_path, "load_on_three")
    expected = torch.load(tmp_path / "expected.pt")
    for path in ("step-2", "theirs"):
        assert_same(alone(tmp_path / path), expected)
    own: dict[str, Any] = {"deep": {"n": None}}
    dcp.load(own, storage_reader=MilepostReader(tmp_path / "own"))
    assert own["deep"]["n"].values == (0, 1)
    assert main(["verify", str(tmp_path / "step-2"), str(tmp_path / "own")]) == 0
    assert main(["ls", str(tmp_path)]) == 0 and "loss=0.5" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "step-2"), str(tmp_path / "whole.ckpt")]) == 0
    assert main(["diff", str(tmp_path / "step-2"), str(tmp_path / "whole.ckpt")]) == 0
    torch.testing.assert_close(torch.load(tmp_path / "whole.ckpt")["model"], expected["model"], rtol=0, atol=0)
    for blob in (tmp_path / "step-2").glob("*.safetensors"):
        flip(blob)
        with pytest.raises(CheckpointException) as caught:
            alone(tmp_path / "step-2")
        assert isinstance(caught.value.failures[0][0], CheckpointCorruptError)
        flip(blob)
    assert_same(alone(tmp_path / "step-2"), expected)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 8
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.timeout(300)
def test_a_rank_that_is_killed_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    with pytest.raises(mp.ProcessExitedException):
        launch(2, tmp_path, "a_rank_is_killed")
    assert main(["verify", str(tmp_path / "step-1")]) == 0
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".pending")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(alone(tmp_path / "step-1"), storage_writer=MilepostWriter(tmp_path / "step-2"))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".pending")]
