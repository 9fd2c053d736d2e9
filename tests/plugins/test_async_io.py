"""AsyncCheckpointIO: order for each path, errors once, bounded memory, reuse."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from milepost.errors import CheckpointSaveError, MisconfigurationException, UnencodableValueError
from milepost.plugins import (
    AsyncCheckpointIO,
    CheckpointIO,
    SafetensorsCheckpointIO,
    SnapshotCheckpointIO,
    TorchCheckpointIO,
)
from milepost.plugins.io import checkpoint_io as io_calls
from milepost.plugins.io.async_io import AsyncSave

LONG = 30  # seconds until a test that hangs fails


class Gated(TorchCheckpointIO):
    """Begins a save only once the gate of its path is open; notes what happened in which order."""

    def __init__(self, *closed: str) -> None:
        super().__init__()
        self.gates = {name: threading.Event() for name in closed}
        self.log: list[str] = []
        self.torn_down = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        name = Path(path).stem
        if name in self.gates:
            assert self.gates[name].wait(LONG)
        super().save_checkpoint(checkpoint, path, storage_options)
        self.log.append(f"save {name} {checkpoint['global_step']}")

    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        self.log.append(f"remove {Path(path).stem}")

    def teardown(self) -> None:
        self.torn_down += 1


def blocked(place: Path) -> Path:
    """A path at which no save can work."""
    (place / "file").write_text("")
    return place / "file" / "a.ckpt"


def test_what_is_changed_while_the_save_waits_does_not_reach_the_file(tmp_path: Path) -> None:
    inner = Gated("a")
    io = AsyncCheckpointIO(inner)
    weight, nested = torch.zeros(1000), {"list": [1]}
    pending = io.save_checkpoint({"global_step": 1, "w": weight, "n": nested}, tmp_path / "a.ckpt")
    weight += 1
    nested["list"].append(2)
    assert not pending.done()
    inner.gates["a"].set()
    pending.result()
    loaded = io.load_checkpoint(tmp_path / "a.ckpt")
    assert float(loaded["w"].sum()) == 0 and loaded["n"] == {"list": [1]}
    io.teardown()


# ---- order -------------------------------------------------------------------------------------------------------


def test_a_load_waits_for_its_own_path_only(tmp_path: Path) -> None:
    inner = Gated("slow")
    TorchCheckpointIO().save_checkpoint({"global_step": 7}, tmp_path / "b.ckpt")
    io = AsyncCheckpointIO(inner)
    pending = io.save_checkpoint({"global_step": 1}, tmp_path / "slow.ckpt")
    assert io.load_checkpoint(tmp_path / "b.ckpt")["global_step"] == 7  # hangs if it waited for the other
    assert io.exists(tmp_path / "b.ckpt") and io.verify(tmp_path / "b.ckpt") is None
    assert io.link(tmp_path / "b.ckpt", tmp_path / "c.ckpt") and not pending.done()
    inner.gates["slow"].set()
    assert io.load_checkpoint(tmp_path / "." / "slow.ckpt")["global_step"] == 1
    assert io.list(tmp_path) == [str(tmp_path / name) for name in ("b.ckpt", "c.ckpt", "slow.ckpt")]
    io.teardown()


def test_a_slow_save_does_not_hold_up_another_path(tmp_path: Path) -> None:
    inner = Gated("slow")
    io = AsyncCheckpointIO(inner, max_pending=2)
    slow = io.save_checkpoint({"global_step": 1}, tmp_path / "slow.ckpt")
    io.save_checkpoint({"global_step": 2}, tmp_path / "quick.ckpt").result(LONG)
    assert not slow.done() and inner.log == ["save quick 2"]
    inner.gates["slow"].set()
    io.teardown()


def test_saves_of_one_path_keep_their_order_whatever_the_number_of_threads(tmp_path: Path) -> None:
    inner = Gated("a")
    io = AsyncCheckpointIO(inner, max_pending=4)
    for step in range(4):
        io.save_checkpoint({"global_step": step}, tmp_path / "a.ckpt" if step % 2 else f"{tmp_path}/./a.ckpt")
    inner.gates["a"].set()
    assert io.load_checkpoint(tmp_path / "a.ckpt")["global_step"] == 3
    assert inner.log == [f"save a {step}" for step in range(4)]
    io.teardown()


def test_a_load_sees_the_save_that_was_asked_for_before_it(tmp_path: Path) -> None:
    io = AsyncCheckpointIO()
    for step in range(5):
        io.save_checkpoint({"global_step": step}, tmp_path / "a.ckpt")
        assert io.load_checkpoint(tmp_path / "a.ckpt")["global_step"] == step
    io.teardown()


def test_a_removal_comes_after_the_save_of_its_path_and_before_the_next(tmp_path: Path) -> None:
    inner = Gated("a")
    io = AsyncCheckpointIO(inner, max_pending=2)
    io.save_checkpoint({"global_step": 1}, tmp_path / "a.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")
    io.save_checkpoint({"global_step": 2}, tmp_path / "a.ckpt")
    inner.gates["a"].set()
    io.wait()
    assert inner.log == ["save a 1", "remove a", "save a 2"] and io.exists(tmp_path / "a.ckpt")
    io.teardown()


def test_the_old_is_removed_once_the_new_is_there_and_nobody_waits_for_it(tmp_path: Path) -> None:
    inner = Gated("new")
    io = AsyncCheckpointIO(inner)
    io.save_checkpoint({"global_step": 1}, tmp_path / "old.ckpt").result()
    io.save_checkpoint({"global_step": 2}, tmp_path / "new.ckpt")
    io.remove_checkpoint(tmp_path / "old.ckpt")  # hangs if it waited
    assert (tmp_path / "old.ckpt").exists()
    inner.gates["new"].set()
    assert not io.exists(tmp_path / "old.ckpt")
    assert inner.log == ["save old 1", "save new 2", "remove old"]
    io.teardown()


def test_the_old_stays_where_the_new_failed(tmp_path: Path) -> None:
    inner = Gated("a")
    io = AsyncCheckpointIO(inner)
    io.save_checkpoint({"global_step": 1}, tmp_path / "old.ckpt").result()
    io.save_checkpoint({"global_step": 2}, blocked(tmp_path))
    io.remove_checkpoint(tmp_path / "old.ckpt")
    inner.gates["a"].set()
    with pytest.raises(CheckpointSaveError, match="step 2"):
        io.wait()
    assert io.exists(tmp_path / "old.ckpt")
    io.teardown()


def test_the_old_stays_where_the_new_had_failed_before_and_nobody_had_been_told(tmp_path: Path) -> None:
    io = AsyncCheckpointIO()
    io.save_checkpoint({"global_step": 1}, tmp_path / "old.ckpt").result()
    pending = io.save_checkpoint({"global_step": 2}, new := blocked(tmp_path))
    io.exists(new)  # waits, and tells nothing
    assert pending.done()
    io.remove_checkpoint(tmp_path / "old.ckpt")
    with pytest.raises(CheckpointSaveError, match="step 2"):
        io.wait()
    assert io.exists(tmp_path / "old.ckpt")
    io.remove_checkpoint(tmp_path / "old.ckpt")
    assert not io.exists(tmp_path / "old.ckpt"), "who was told may go on"
    io.teardown()


def test_the_old_stays_where_the_news_handle_tells_of_its_failure_first(tmp_path: Path) -> None:
    inner = Gated("a")
    io = AsyncCheckpointIO(inner)
    io.save_checkpoint({"global_step": 1}, tmp_path / "old.ckpt").result()
    pending = io.save_checkpoint({"global_step": 2}, blocked(tmp_path))
    io.remove_checkpoint(tmp_path / "old.ckpt")
    threading.Thread(target=inner.gates["a"].set).start()
    with pytest.raises(CheckpointSaveError, match="step 2"):
        pending.result()
    io.wait()
    assert io.exists(tmp_path / "old.ckpt")
    io.teardown()


# ---- errors ------------------------------------------------------------------------------------------------------


def test_an_error_is_raised_once_with_path_and_step_and_the_next_run_is_clean(tmp_path: Path) -> None:
    io = AsyncCheckpointIO()
    pending = io.save_checkpoint({"global_step": 3}, blocked(tmp_path))
    with pytest.raises(CheckpointSaveError, match="step 3") as caught:
        io.wait()
    assert caught.value.path == str(tmp_path / "file" / "a.ckpt") and caught.value.step == 3
    pending.result()
    io.teardown()
    io.save_checkpoint({"global_step": 4}, tmp_path / "b.ckpt").result()
    io.teardown()
    assert io.load_checkpoint(tmp_path / "b.ckpt")["global_step"] == 4


@pytest.mark.parametrize("asked", ["handle", "next save", "load of the path", "wait", "teardown"])
def test_whoever_asks_first_gets_the_error_and_nobody_after(tmp_path: Path, asked: str) -> None:
    io = AsyncCheckpointIO()
    path = blocked(tmp_path)
    pending = io.save_checkpoint({"global_step": 3}, path)
    io.exists(path)  # waits until it has failed
    ways = {
        "handle": pending.result,
        "next save": lambda: io.save_checkpoint({"global_step": 4}, tmp_path / "b.ckpt"),
        "load of the path": lambda: io.load_checkpoint(path),
        "wait": io.wait,
        "teardown": io.teardown,
    }
    with pytest.raises(CheckpointSaveError, match="step 3"):
        ways[asked]()
    assert not (tmp_path / "b.ckpt").exists()
    for name in ("handle", "wait", "teardown", "next save"):
        ways[name]()
    io.teardown()
    assert (tmp_path / "b.ckpt").exists()


def test_of_several_failures_none_is_lost_and_none_comes_twice(tmp_path: Path) -> None:
    inner = Gated("a")
    io = AsyncCheckpointIO(inner, max_pending=3)
    path = blocked(tmp_path)
    handles = [io.save_checkpoint({"global_step": step}, path) for step in (1, 2, 3)]
    inner.gates["a"].set()
    with pytest.raises(CheckpointSaveError, match="step 1") as caught:
        io.wait()
    assert [(error.step, error.path) for error in caught.value.others] == [(2, str(path)), (3, str(path))]
    assert [note.count("step 2") + 2 * note.count("step 3") for note in caught.value.__notes__] == [1, 2]
    for handle in handles:
        handle.result()
    io.teardown()


class Fails(CheckpointIO):
    """Fails with an error of its own, and keeps no hold of what it was given."""

    def __init__(self) -> None:
        self.given: Any = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.given = weakref.ref(checkpoint["w"])
        try:
            raise KeyError("first")
        except KeyError as error:
            raise RuntimeError("the network is gone") from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> Any: ...

    def remove_checkpoint(self, path: Any) -> None:
        raise PermissionError(f"not {path}")


def test_any_error_of_the_plugin_gets_path_and_step(tmp_path: Path) -> None:
    io = AsyncCheckpointIO(Fails())
    pending = io.save_checkpoint({"global_step": 5, "w": torch.ones(1)}, "s3://bucket/a.ckpt")
    with pytest.raises(
        CheckpointSaveError, match=r"step 5 to 's3://bucket/a\.ckpt'.*RuntimeError: the network"
    ) as caught:
        pending.result()
    assert isinstance(caught.value.__cause__, RuntimeError) and caught.value.step == 5
    io.teardown()


def test_a_failed_save_does_not_keep_its_snapshot_in_memory() -> None:
    inner = Fails()
    io = AsyncCheckpointIO(inner)
    pending = io.save_checkpoint({"global_step": 5, "w": torch.ones(1)}, "a")
    io.exists("a")
    gc.collect()
    assert pending.done() and inner.given() is None
    with pytest.raises(CheckpointSaveError):
        io.teardown()


def test_a_failed_removal_in_the_background_is_raised_once(tmp_path: Path) -> None:
    class Both(Gated):
        def remove_checkpoint(self, path: Any) -> None:
            raise PermissionError(f"not {path}")

    inner = Both("a")
    io = AsyncCheckpointIO(inner)
    with pytest.raises(PermissionError):
        io.remove_checkpoint(tmp_path / "b.ckpt")  # nothing under way: right here, as it is
    io.save_checkpoint({"global_step": 1}, tmp_path / "a.ckpt")
    io.remove_checkpoint(tmp_path / "b.ckpt")
    inner.gates["a"].set()
    with pytest.raises(CheckpointSaveError, match=r"Removing.*b\.ckpt.*PermissionError"):
        io.wait()
    io.teardown()


def test_teardown_reaches_the_inner_plugin_even_when_a_save_failed(tmp_path: Path) -> None:
    inner = Gated()
    io = AsyncCheckpointIO(inner)
    io.save_checkpoint({"global_step": 3}, blocked(tmp_path))
    with pytest.raises(CheckpointSaveError):
        io.teardown()
    assert inner.torn_down == 1
    io.teardown()
    assert inner.torn_down == 2


# ---- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_pending", [1, 2, 3])
def test_never_more_snapshots_than_were_allowed(tmp_path: Path, max_pending: int) -> None:
    counted: list[int] = []

    class Counts:
        """Is copied with each snapshot, and then notes how many of them have not been written yet."""

        def __deepcopy__(self, memo: Any) -> Counts:
            counted.append(len(counted) + 1 - len(inner.log))
            return self

        def __reduce__(self) -> Any:
            return Counts, ()

    class Counting(Gated):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            super().save_checkpoint({"global_step": checkpoint["global_step"]}, path)

    inner = Counting("0")
    io = AsyncCheckpointIO(inner, max_pending=max_pending)

    def save_all() -> None:
        for step in range(8):
            io.save_checkpoint({"global_step": step, "c": Counts()}, tmp_path / f"{step % 4}.ckpt")

    saver = threading.Thread(target=save_all)
    saver.start()
    inner.gates["0"].set()
    saver.join(LONG)
    io.teardown()
    assert len(counted) == 8 and max(counted) <= max_pending and len(inner.log) == 8


def test_a_save_that_finds_no_place_waits_before_it_copies(tmp_path: Path) -> None:
    inner = Gated("0", "1")
    io = AsyncCheckpointIO(inner, max_pending=2)
    values = torch.zeros(3)
    for step in range(2):
        io.save_checkpoint({"global_step": step}, tmp_path / f"{step}.ckpt")
    third = threading.Thread(
        target=io.save_checkpoint, args=({"global_step": 2, "values": values}, tmp_path / "2.ckpt")
    )
    third.start()
    values += 1  # it has not been copied: there is no place yet
    inner.gates["1"].set()
    third.join(LONG)
    inner.gates["0"].set()
    assert io.load_checkpoint(tmp_path / "2.ckpt")["values"].tolist() == [1, 1, 1]
    io.teardown()
    assert sorted(inner.log) == ["save 0 0", "save 1 1", "save 2 2"]


# ---- what can be wrapped -----------------------------------------------------------------------------------------


def test_any_plugin_can_be_wrapped_and_what_is_none_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="remove_checkpoint"):
        AsyncCheckpointIO(object())
    with pytest.raises(MisconfigurationException, match="max_pending=0"):
        AsyncCheckpointIO(max_pending=0)


def test_the_inner_plugins_check_is_asked() -> None:
    with pytest.raises(UnencodableValueError):
        io_calls.check(AsyncCheckpointIO(), {"a": object()})
    io_calls.check(AsyncCheckpointIO(TorchCheckpointIO(allow_pickle=True)), {"a": object()})
    io_calls.check(AsyncCheckpointIO(TwoArguments()), {"a": object()})


class TwoArguments(CheckpointIO):
    """Written as the documentation page shows it."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.kept[str(path)] = checkpoint

    def load_checkpoint(self, path: Any, storage_options: Any = None) -> Any:  # type: ignore[override]
        assert storage_options is None
        return self.kept.get(str(path))

    def remove_checkpoint(self, path: Any) -> None:
        self.kept.pop(str(path), None)


def test_the_two_argument_plugin_is_called_with_what_it_takes() -> None:
    io = TwoArguments()
    pending = io_calls.save(io, {"a": 1}, "p")
    assert pending.done() and pending.path == "p"
    assert io_calls.load(io, "p", map_location="cpu", weights_only=True) == {"a": 1}
    assert io_calls.verify(io, "p") == "cannot" and io_calls.link(io, "p", "q") is False
    with pytest.raises(ValueError, match=r"TwoArguments\.load_checkpoint"):
        io_calls.load(io, "missing")


# ---- one way to stage ------------------------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Counts torch's own copies of data."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("clone", "copy_", "_to_copy", "contiguous", "cat", "stack"):
            self.made.append(str(func))
        return func(*args, **(kwargs or {}))


def tied_state() -> dict[str, Any]:
    weight = torch.randn(500, 400)
    moments = {0: {"exp_avg": torch.randn(500, 400), "step": torch.tensor(3.0)}}
    return {
        "global_step": 1,
        "state_dict": {"embed.weight": weight, "head.weight": weight, "bias": torch.randn(500)},
        "optimizer_states": [{"state": moments, "param_groups": [{"params": [0]}]}],
    }


@pytest.mark.parametrize("inner", [TorchCheckpointIO, SafetensorsCheckpointIO, TwoArguments])
def test_each_byte_is_copied_once_into_one_memory(tmp_path: Path, inner: Any) -> None:
    io = AsyncCheckpointIO(inner())
    state = tied_state()
    for step in range(3):
        state["global_step"] = step
        with Copies() as copies:
            io.save_checkpoint(state, tmp_path / "a").result()
        assert copies.made == []
    (arena,) = io._arenas
    assert arena.copied_bytes == 3 * (2 * 500 * 400 + 500 + 1) * 4
    assert arena.memories == (3 if inner is TwoArguments else 1), "what keeps its tensors in memory keeps that memory"
    found = io.load_checkpoint(tmp_path / "a")
    weights = found["state_dict"]
    assert torch.equal(weights["head.weight"], state["state_dict"]["head.weight"]) and found["global_step"] == 2
    assert weights["embed.weight"].data_ptr() == weights["head.weight"].data_ptr(), "tied"
    io.teardown()
    assert io._arenas == []


def test_what_a_plugin_keeps_is_not_written_over(tmp_path: Path) -> None:
    inner = TwoArguments()
    io = AsyncCheckpointIO(inner)
    values = torch.zeros(100)
    for step in range(3):
        values.fill_(step)
        io.save_checkpoint({"global_step": step, "values": values}, str(step)).result()
    assert [float(inner.kept[str(step)]["values"].sum()) for step in range(3)] == [0, 100, 200]
    io.teardown()


def test_a_plugin_that_copies_itself_is_left_to_it(tmp_path: Path) -> None:
    inner = SnapshotCheckpointIO()
    io = AsyncCheckpointIO(inner, max_pending=2)
    state = tied_state()
    for step in range(3):
        pending = io.save_checkpoint(state, tmp_path / f"{step}")
        state["state_dict"]["bias"].add_(1)
        io.remove_checkpoint(tmp_path / f"{step - 1}")
        assert isinstance(pending, AsyncSave)
    io.wait()
    assert io._arenas == [] and inner._engine._arena.memories == 1
    assert io.list(tmp_path) == [str(tmp_path / "2")]
    assert torch.equal(io.load_checkpoint(tmp_path / "2")["state_dict"]["bias"] + 1, state["state_dict"]["bias"])
    io.teardown()


def test_of_a_plugin_that_copies_itself_failures_come_once_too(tmp_path: Path) -> None:
    io = AsyncCheckpointIO(SnapshotCheckpointIO())
    pending = io.save_checkpoint({"global_step": 3}, blocked(tmp_path))
    with pytest.raises(CheckpointSaveError):
        io.save_checkpoint({"global_step": 4}, tmp_path / "b")
    pending.result()
    io.teardown()
    assert not (tmp_path / "b").exists()


def test_lazily_the_next_step_waits(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(50, 50), torch.nn.BatchNorm1d(50))
    optimizer = torch.optim.AdamW(model.parameters())
    io, go = AsyncCheckpointIO(lazy=True), threading.Event()
    for step in range(3):
        model(torch.randn(4, 50)).sum().backward()
        optimizer.step()
        for _ in range(2):
            io._threads().submit(go.wait)
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        io.save_checkpoint({"global_step": step, "m": model.state_dict()}, tmp_path / "a", optimizers=[optimizer])
        assert not io._gate._open[0].done()
        model(torch.randn(4, 50)).sum().backward()
        go.set()
        optimizer.step()
        found = io.load_checkpoint(tmp_path / "a")["m"]
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        go.clear()
    io.teardown()
