"""Saving states as directories: exact, reused where nothing changed, verified, replaced in one step."""

from __future__ import annotations

import collections
import dataclasses
import enum
import os
import pathlib
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from milepost.engine import planner
from milepost.engine.directory import DirectoryEngine
from milepost.engine.state import DTYPES
from milepost.errors import (
    CheckpointCorruptError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    UnencodableValueError,
)

MIB = 1 << 20


@pytest.fixture
def engine() -> Any:
    made = DirectoryEngine()
    yield made
    made.close()


class Colour(enum.Enum):
    RED = "r"


@dataclasses.dataclass
class Settings:
    path: pathlib.Path
    colour: Colour


VALUES: dict[str, Any] = {
    "settings": Settings(pathlib.Path("/a"), Colour.RED), "ordered": collections.OrderedDict(b=1, a=2),
    "tuple": ((1,), [2.5]), "set": {1, 2}, "complex": 3 + 4j, "bytes": b"\0\xff", "bytearray": bytearray(b"q"),
    "dtype": torch.float16, "size": torch.Size([1, 2]), "device": torch.device("cpu"), "big": 10**30, "zero": -0.0,
    "infinite": float("-inf"), "keys": {1: "a", None: "b", (1, 2): "c", "$": 3, False: 4.0},
    "counter": collections.Counter("aab"),
}  # fmt: skip


def test_values_come_back_exact_in_type_and_order(engine: DirectoryEngine, tmp_path: Path) -> None:
    engine.save(tmp_path / "c", {"v": VALUES, "nan": float("nan")}, background=False)
    found = engine.load(tmp_path / "c")
    assert list(found["v"]) == list(VALUES)
    for name, value in VALUES.items():
        assert found["v"][name] == value and type(found["v"][name]) is type(value)
    assert list(found["v"]["keys"]) == list(VALUES["keys"])
    assert str(found["v"]["zero"]) == "-0.0" and found["nan"] != found["nan"]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.float8_e5m2fnuz, torch.complex64, torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    ],
)  # fmt: skip
def test_every_type_and_memory_order(engine: DirectoryEngine, tmp_path: Path, dtype: torch.dtype) -> None:
    base = torch.randint(0, 2, (2, 3, 4, 5)).to(dtype)
    state = {
        "plain": base, "channels_last": base.contiguous(memory_format=torch.channels_last), "strided": base[:, ::2],
        "scalar": base[0, 0, 0, 0], "empty": base[:0], "transposed": base.transpose(1, 3),
    }  # fmt: skip
    for background in (True, False):
        engine.save(tmp_path / "c", {"t": state}, background=background).result()
        found = engine.load(tmp_path / "c")["t"]
        for name, tensor in state.items():
            assert found[name].dtype == dtype and found[name].shape == tensor.shape
            assert as_bytes(found[name]) == as_bytes(tensor)
        if dtype in DTYPES:  # others are stored as bytes, in C order
            assert found["channels_last"].stride() == state["channels_last"].stride()


def as_bytes(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()  # type: ignore[no-any-return]


def test_tied_tensors_stay_tied_and_are_stored_once(engine: DirectoryEngine, tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    engine.save(tmp_path / "c", {"model": {"a": weight, "b": weight}, "again": [weight]}, background=False)
    found = engine.load(tmp_path / "c")
    assert found["model"]["a"] is found["model"]["b"] is found["again"][0]
    assert sum(p.stat().st_size for p in (tmp_path / "c").glob("*.safetensors")) < 1.1 * weight.nbytes


def test_a_snapshot_is_not_torn_by_what_comes_after(engine: DirectoryEngine, tmp_path: Path) -> None:
    state = {"model": {"w": torch.zeros(4 * MIB)}, "n": [1]}
    save = engine.save(tmp_path / "c", state)
    state["model"]["w"].fill_(1)
    state["n"][0] = 2
    save.result()
    found = engine.load(tmp_path / "c")
    assert not found["model"]["w"].any() and found["n"] == [1]


def test_saving_draws_no_random_numbers(engine: DirectoryEngine, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    engine.save(tmp_path / "c", {"w": torch.ones(3)}).result()
    assert torch.equal(before, torch.get_rng_state())


# ---- what is written again -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [True, False])
def test_only_what_changed_is_written(engine: DirectoryEngine, tmp_path: Path, background: bool) -> None:
    """A frozen base with small adapters between its layers: after the first save only the adapters are written."""
    state = {f"layer.{n}.{k}": torch.randn(MIB // 4 if k == "w" else 5000) for n in range(16) for k in ("w", "adapter")}
    changing = sum(t.nbytes for name, t in state.items() if "adapter" in name)
    for step in range(6):
        for name, tensor in state.items():
            if "adapter" in name:
                tensor.add_(1)
        engine.save(tmp_path / str(step), state, step=step, background=background).result()
        found = engine.load(tmp_path / str(step))
        assert all(torch.equal(found[name], state[name]) for name in state)
    sizes = [written_between(tmp_path / str(n), tmp_path / str(n - 1)) for n in range(1, 6)]
    assert max(sizes) <= 1.05 * changing + 16_000
    engine.save(tmp_path / "same", state, step=9, background=background).result()
    assert written_between(tmp_path / "same", tmp_path / "5") <= 16_000


def written_between(directory: Path, before: Path) -> int:
    """Bytes of the files of a checkpoint that the one before does not share."""
    known = {p.stat().st_ino for p in before.iterdir()}
    return sum(p.stat().st_size for p in directory.iterdir() if p.stat().st_ino not in known)


@pytest.mark.parametrize("background", [True, False])
def test_each_changed_piece_is_read_once_however_many_tensors_lie_in_it(
    engine: DirectoryEngine, tmp_path: Path, background: bool
) -> None:
    state = {"model": {f"w{n}": torch.full((700,), float(n)) for n in range(2000)}}  # 5.6 MB: six pieces
    for number, changed in enumerate((range(0), range(700), range(2000))):
        for n in changed:
            state["model"][f"w{n}"] += 1
        reads: list[int] = []

        def seen(frame: Any, event: str, call: Any, reads: list[int] = reads) -> None:
            if event == "c_call" and getattr(call, "__name__", "") == "pread":
                reads.append(1)

        threading.setprofile(seen)
        sys.setprofile(seen)
        fresh = DirectoryEngine()  # its threads are started under the profile
        if number:
            fresh.adopt(tmp_path / str(number - 1))
        fresh.save(tmp_path / str(number), state, background=background).result()
        fresh.close()
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        assert len(reads) <= planner._SAMPLES + 6
        files = {p.name for p in (tmp_path / str(number)).glob("*.safetensors")}
        assert len(files) == (2 if number == 1 else 1)
        loaded = engine.load(tmp_path / str(number))["model"]
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state["model"].items())


def test_a_delta_names_the_file_of_each_tensor_for_other_tools(engine: DirectoryEngine, tmp_path: Path) -> None:
    import json

    from safetensors import safe_open

    state = {"frozen": torch.randn(MIB), "trained": torch.randn(1000)}
    engine.save(tmp_path / "1", {"model": state}, background=False)
    state["trained"].add_(1)
    engine.save(tmp_path / "2", {"model": state}, background=False)
    where = json.loads((tmp_path / "2" / "model.safetensors.index.json").read_bytes())["weight_map"]
    assert set(where) == set(state) and len(set(where.values())) == 2
    for name, file in where.items():
        with safe_open(tmp_path / "2" / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), state[name])


def test_a_blob_is_written_afresh_after_so_many_links(
    engine: DirectoryEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "MAX_LINKS", 3)
    state = {"model": {"w": torch.randn(1000)}}
    inodes = []
    for step in range(6):
        engine.save(tmp_path / str(step), state, background=False)
        inodes.append((tmp_path / str(step) / "model.safetensors").stat().st_ino)
    assert [inodes.index(i) for i in inodes] == [0, 0, 0, 0, 4, 4]


def test_a_rotten_blob_is_not_linked_for_ever(
    engine: DirectoryEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "VERIFY_EVERY", 0)
    state = {"model": {"w": torch.randn(1000)}}
    engine.save(tmp_path / "1", state, background=False)
    flip(tmp_path / "1" / "model.safetensors", 900)
    engine.save(tmp_path / "2", state, background=False)
    engine.verify(tmp_path / "2")
    with pytest.raises(CheckpointCorruptError):
        engine.verify(tmp_path / "1")


def test_where_no_link_can_be_made_it_is_written(engine: DirectoryEngine, tmp_path: Path) -> None:
    state = {"model": {"w": torch.randn(1000)}}
    engine.save(tmp_path / "1", state, background=False)
    engine.remove(tmp_path / "1")
    engine.save(tmp_path / "2", state, background=False)
    assert torch.equal(engine.load(tmp_path / "2")["model"]["w"], state["model"]["w"])


# ---- reading ---------------------------------------------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_every_flipped_byte_is_found_and_the_tensor_named(engine: DirectoryEngine, tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = {"model": {"a": torch.randn(3 * MIB // 4), "b": torch.randn(MIB)}, "x": {"c": torch.ones(3)}}
    engine.save(tmp_path / "c", state, background=False)
    for path in sorted((tmp_path / "c").iterdir()):
        size = path.stat().st_size
        for offset in sorted({0, 7, 8, size // 3, size // 2, size - 1}):
            flip(path, offset)
            with pytest.raises((CheckpointCorruptError, CheckpointFormatError)) as caught:
                engine.verify(tmp_path / "c")
            assert path.name in str(caught.value)
            if path.name == "model.safetensors" and offset == size - 1:
                assert isinstance(caught.value, CheckpointCorruptError)
                assert caught.value.tensor == "model.b" and caught.value.byte_range == (size // MIB * MIB, size)
            flip(path, offset)
    engine.verify(tmp_path / "c")


def test_one_tensor_is_read_by_its_pieces_alone(engine: DirectoryEngine, tmp_path: Path) -> None:
    from milepost.engine.state import references

    state = {"model": {str(n): torch.randn(600_000) for n in range(20)}}
    engine.save(tmp_path / "c", state, background=False)
    with engine.open(tmp_path / "c") as stored:
        wanted = [ref for ref in references(stored.tree) if stored.index(ref.blob).names[ref.row] == "7"]
        small = stored.bytes_read
        (tensor,) = engine.read_tensors(stored, wanted).values()
        assert torch.equal(tensor, state["model"]["7"])
        assert stored.bytes_read - small <= tensor.nbytes + 2 * MIB


@pytest.mark.parametrize("what", ["cut", "longer", "gone", "fifo", "link", "swapped"])
def test_files_that_are_not_what_was_written(engine: DirectoryEngine, tmp_path: Path, what: str) -> None:
    engine.save(tmp_path / "c", {"model": {"a": torch.randn(1000)}}, background=False)
    engine.save(tmp_path / "other", {"model": {"a": torch.randn(1000)}}, background=False)
    blob = tmp_path / "c" / "model.safetensors"
    data = blob.read_bytes()
    blob.unlink()
    if what == "cut":
        blob.write_bytes(data[:-1])
    elif what == "longer":
        blob.write_bytes(data + b"\0")
    elif what == "fifo":
        os.mkfifo(blob)
    elif what == "link":
        (tmp_path / "outside").write_bytes(data)
        blob.symlink_to(tmp_path / "outside")
    elif what == "swapped":
        blob.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    for read in (engine.verify, engine.load):
        with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors"):
            read(tmp_path / "c")


def test_what_is_no_checkpoint(engine: DirectoryEngine, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        engine.load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointFormatError, match=r"no manifest\.json"):
        engine.load(tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointFormatError, match="no checkpoint directory"):
        engine.load(tmp_path / "file")


# ---- failures --------------------------------------------------------------------------------------------------------


def test_a_value_that_cannot_be_data_is_named_and_nothing_written(engine: DirectoryEngine, tmp_path: Path) -> None:
    with pytest.raises(UnencodableValueError, match=r"model\.deep\.0") as caught:
        engine.save(tmp_path / "c", {"model": {"deep": [lambda: None]}})
    assert caught.value.key_path == "model.deep.0"
    with pytest.raises(UnencodableValueError, match="meta device"):
        engine.save(tmp_path / "c", {"model": nn.Linear(2, 2, device="meta").state_dict()})
    assert not any(tmp_path.iterdir())


def test_a_failed_save_is_told_once_and_what_was_there_stays(engine: DirectoryEngine, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the directory should be")
    for background in (True, False):
        with pytest.raises(CheckpointSaveError, match="step 3") as caught:
            engine.save(blocked / "c", {"w": torch.ones(3)}, step=3, background=background).result()
        assert caught.value.step == 3 and caught.value.path == str(blocked / "c")
    engine.save(tmp_path / "good", {"w": torch.ones(3)}).result()
    engine.save(blocked / "c", {"w": torch.ones(3)}, step=4)
    with pytest.raises(CheckpointSaveError, match="step 4"):
        engine.wait()
    engine.wait()
    assert blocked.read_text() == "a file where the directory should be"


def test_an_existing_checkpoint_is_replaced_in_one_step_while_a_reader_holds_it(
    engine: DirectoryEngine, tmp_path: Path
) -> None:
    engine.save(tmp_path / "c", {"model": {"w": torch.zeros(10)}}, background=False)
    with engine.open(tmp_path / "c") as stored:
        engine.save(tmp_path / "c", {"model": {"w": torch.ones(10)}}, background=False)
        assert stored.head.step == 0
    assert engine.load(tmp_path / "c")["model"]["w"].all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


def test_memory_for_snapshots_is_kept_and_used_again(engine: DirectoryEngine, tmp_path: Path) -> None:
    state = {"model": {"w": torch.zeros(MIB)}}
    size = engine.prepare(state)
    address = engine._arena._memory.address  # type: ignore[union-attr]
    for step in range(3):
        engine.save(tmp_path / str(step), state).result()
    assert engine._arena._memory.address == address  # type: ignore[union-attr]
    assert state["model"]["w"].nbytes <= size <= state["model"]["w"].nbytes + 8192
