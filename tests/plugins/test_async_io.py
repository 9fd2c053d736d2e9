"""AsyncCheckpointIO: full snapshots, order for each path, errors once, bounded memory, reuse."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from milepost.errors import CheckpointSaveError, MisconfigurationException
from milepost.plugins import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from milepost.plugins.io import checkpoint_io as io_calls
from milepost.plugins.io.async_io import snapshot


class Gated(TorchCheckpointIO):
    """Writes only once the gate is open; notes what happened in which order."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.log: list[str] = []
        self.torn_down = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        assert self.gate.wait(30)
        super().save_checkpoint(checkpoint, path, storage_options)
        self.log.append(f"save {Path(path).name}")

    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        self.log.append(f"remove {Path(path).name}")

    def teardown(self) -> None:
        self.torn_down += 1


def test_a_snapshot_is_not_torn_by_later_changes_and_ties_stay_tied(tmp_path: Path) -> None:
    inner = Gated()
    io = AsyncCheckpointIO(inner)
    weight, array, nested = torch.zeros(1000), np.zeros(5), {"list": [1]}
    before = torch.get_rng_state()
    pending = io.save_checkpoint(
        {"global_step": 1, "state_dict": {"a": weight, "b": weight, "part": weight[10:20]}, "x": array, "n": nested},
        tmp_path / "a.ckpt",
    )
    assert torch.equal(
        before.torch_cpu if hasattr(before, "torch_cpu") else torch.get_rng_state(), torch.get_rng_state()
    )
    weight += 1
    array += 1
    nested["list"].append(2)
    assert not pending.done()
    inner.gate.set()
    pending.result()
    loaded = io.load_checkpoint(tmp_path / "a.ckpt")
    assert (
        float(loaded["state_dict"]["a"].sum()) == 0 and loaded["n"] == {"list": [1]} and float(loaded["x"].sum()) == 0
    )
    assert loaded["state_dict"]["a"].data_ptr() == loaded["state_dict"]["b"].data_ptr()
    assert loaded["state_dict"]["part"].untyped_storage().data_ptr() == loaded["state_dict"]["a"].data_ptr()
    io.teardown()


def test_a_removal_waits_for_the_save_of_the_same_path(tmp_path: Path) -> None:
    inner = Gated()
    io = AsyncCheckpointIO(inner)
    io.save_checkpoint({"global_step": 1}, tmp_path / "a.ckpt")
    remover = threading.Thread(target=io.remove_checkpoint, args=(tmp_path / "a.ckpt",))
    remover.start()
    inner.gate.set()
    remover.join()
    assert inner.log == ["save a.ckpt", "remove a.ckpt"] and not io.exists(tmp_path / "a.ckpt")
    io.teardown()


def test_a_load_sees_the_save_that_was_asked_for_before_it(tmp_path: Path) -> None:
    io = AsyncCheckpointIO()
    for step in range(5):
        io.save_checkpoint({"global_step": step}, tmp_path / "a.ckpt")
        assert io.load_checkpoint(tmp_path / "a.ckpt")["global_step"] == step
    io.teardown()


def test_an_error_is_raised_once_with_path_and_step_and_the_next_run_is_clean(tmp_path: Path) -> None:
    io = AsyncCheckpointIO()
    (tmp_path / "file").write_text("")
    pending = io.save_checkpoint({"global_step": 3}, tmp_path / "file" / "a.ckpt")
    with pytest.raises(CheckpointSaveError, match="step 3") as caught:
        io.wait()
    assert caught.value.path == str(tmp_path / "file" / "a.ckpt") and caught.value.step == 3
    pending.result()
    io.teardown()
    io.save_checkpoint({"global_step": 4}, tmp_path / "b.ckpt").result()
    io.teardown()
    assert io.load_checkpoint(tmp_path / "b.ckpt")["global_step"] == 4


def test_the_queue_is_bounded(tmp_path: Path) -> None:
    inner = Gated()
    io = AsyncCheckpointIO(inner, max_pending=2)
    handles = [io.save_checkpoint({"global_step": n}, tmp_path / f"{n}.ckpt") for n in range(2)]
    third = threading.Thread(target=io.save_checkpoint, args=({"global_step": 2}, tmp_path / "2.ckpt"))
    third.start()
    assert [h.done() for h in handles] == [False, False] and len(io._pending) <= 2
    inner.gate.set()
    third.join()
    io.teardown()
    assert inner.log == ["save 0.ckpt", "save 1.ckpt", "save 2.ckpt"]


def test_teardown_reaches_the_inner_plugin_even_when_a_save_failed(tmp_path: Path) -> None:
    inner = Gated()
    inner.gate.set()
    io = AsyncCheckpointIO(inner)
    (tmp_path / "file").write_text("")
    io.save_checkpoint({"global_step": 3}, tmp_path / "file" / "a.ckpt")
    with pytest.raises(CheckpointSaveError):
        io.teardown()
    assert inner.torn_down == 1
    io.teardown()
    assert inner.torn_down == 2


def test_any_plugin_can_be_wrapped_and_what_is_none_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="remove_checkpoint"):
        AsyncCheckpointIO(object())
    with pytest.raises(MisconfigurationException, match="max_pending=0"):
        AsyncCheckpointIO(max_pending=0)


def test_a_snapshot_of_a_slice_keeps_its_values() -> None:
    base = torch.arange(10.0)
    copy = snapshot({"s": base[2:8:2], "t": base.reshape(2, 5).t()})
    base.zero_()
    assert copy["s"].tolist() == [2, 4, 6] and copy["t"].shape == (5, 2) and copy["t"][1].tolist() == [1, 6]


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


def test_a_snapshot_keeps_a_state_dicts_versions_and_lazy_conjugates() -> None:
    state = torch.nn.BatchNorm1d(2).state_dict()
    assert snapshot(state)._metadata == state._metadata
    conjugate = torch.tensor([1 + 2j]).conj()
    assert snapshot({"c": conjugate})["c"].tolist() == [1 - 2j]
