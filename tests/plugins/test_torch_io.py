"""TorchCheckpointIO: whole or absent, verified, safe, open."""

from __future__ import annotations

import dataclasses
import enum
import errno
import io
import os
import random
import resource
import signal
import threading
import warnings
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from milepost.engine import values
from milepost.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointRemoveError,
    CheckpointSaveError,
    UnencodableValueError,
    UnsafeCheckpointError,
)
from milepost.plugins import TorchCheckpointIO
from milepost.storage import local


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Options:
    width: int
    where: Path


class Custom:
    """Something that is no data."""


def checkpoint(**more: Any) -> dict[str, Any]:
    tied = torch.arange(300_000, dtype=torch.float32)
    return {"global_step": 7, "state_dict": {"a": tied, "b": tied, "c": torch.ones(3)}, **more}


def test_large_tensors_can_be_mapped_from_the_file_that_was_verified(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    saved = {"large": torch.arange(2.0**16), "small": [torch.arange(3.0)]}
    TorchCheckpointIO().save_checkpoint(saved, path)
    loaded = TorchCheckpointIO().load_checkpoint(path, mapped=True)
    path.unlink()
    maps = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line
    ]

    def is_mapped(tensor: torch.Tensor) -> bool:
        return any(int(start, 16) <= tensor.data_ptr() < int(stop, 16) for start, stop in maps)

    assert torch.equal(loaded["large"], saved["large"]) and torch.equal(loaded["small"][0], saved["small"][0])
    assert is_mapped(loaded["large"]) and not is_mapped(loaded["small"][0])


def test_torch_reads_the_file_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.ckpt"
    TorchCheckpointIO().save_checkpoint(checkpoint(), path)
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert torch.equal(loaded["state_dict"]["a"], checkpoint()["state_dict"]["a"])
        assert loaded["state_dict"]["a"].data_ptr() == loaded["state_dict"]["b"].data_ptr()
    assert zipfile.ZipFile(path).testzip() is None
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]
    assert path.stat().st_size < 1.02 * 4 * 300_000


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    io, path = TorchCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint({"global_step": 1, "state_dict": {"w": torch.arange(50)}}, path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(CheckpointCorruptError):
            io.load_checkpoint(path)
    path.write_bytes(whole)
    io.verify(path)


def test_damage_is_named_by_byte_range(tmp_path: Path) -> None:
    io, path = TorchCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint(checkpoint(), path)
    with path.open("r+b") as file:
        file.seek(1_100_000)
        file.write(b"\xff")
    with pytest.raises(CheckpointCorruptError, match="bytes 1048576 to") as caught:
        io.verify(path)
    assert caught.value.byte_range is not None and caught.value.byte_range[0] == 1 << 20
    assert caught.value.tensor == "state_dict.a"


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.999])
def test_a_cut_file_is_found(tmp_path: Path, keep: float) -> None:
    io, path = TorchCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint(checkpoint(), path)
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if isinstance(keep, float) else keep)
    with pytest.raises(CheckpointCorruptError):
        io.load_checkpoint(path)


def test_a_flipped_weight_in_torchs_own_file_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "torch.ckpt"
    torch.save(checkpoint(), path)
    assert TorchCheckpointIO().load_checkpoint(path)["global_step"] == 7
    with path.open("r+b") as file:
        file.seek(600_000)
        file.write(b"\xff")
    torch.load(path, weights_only=True)  # torch itself does not notice
    with pytest.raises(CheckpointCorruptError):
        TorchCheckpointIO().load_checkpoint(path)


def test_a_disk_that_is_full_is_an_error_and_the_old_file_stays(tmp_path: Path) -> None:
    io, path = TorchCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint(checkpoint(), path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(CheckpointSaveError, match="step 7") as caught:
            io.save_checkpoint(checkpoint(extra=torch.zeros(9)), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert (caught.value.path, caught.value.step) == (str(path), 7)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_directory_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").mkdir()
    with pytest.raises(CheckpointSaveError):
        TorchCheckpointIO().save_checkpoint(checkpoint(), tmp_path / "a.ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_nothing_is_written_to_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "does-not-exist"))
    TorchCheckpointIO().save_checkpoint(checkpoint(), tmp_path / "a.ckpt")
    assert not (tmp_path / "does-not-exist").exists()


def test_values_come_back_exact_and_torch_sees_plain_ones(tmp_path: Path) -> None:
    hparams = {
        "path": Path("/data/x"),
        "colour": Colour.RED,
        "rate": np.float64(0.1),
        "table": np.arange(6, dtype=np.int16).reshape(2, 3),
        "options": Options(3, Path("y")),
        "names": {"b", "a"},
        "z": 1 + 2j,
        "every": timedelta(minutes=5),
        "betas": (0.9, 0.999),
        "nan": float("nan"),
    }
    path = tmp_path / "a.ckpt"
    given = checkpoint(hyper_parameters=hparams)
    TorchCheckpointIO().save_checkpoint(given, path)
    assert given["hyper_parameters"] is hparams and hparams["colour"] is Colour.RED  # the dict passed in is left alone
    plain = torch.load(path, weights_only=True)["hyper_parameters"]
    assert (plain["path"], plain["colour"], plain["rate"], plain["options"]["width"]) == ("/data/x", "red", 0.1, 3)
    loaded = TorchCheckpointIO().load_checkpoint(path)
    assert "milepost" not in loaded
    exact = loaded["hyper_parameters"]
    for name in ("path", "colour", "rate", "options", "names", "z", "every", "betas"):
        assert exact[name] == hparams[name] and type(exact[name]) is type(hparams[name]), name
    assert exact["table"].dtype == np.int16 and np.array_equal(exact["table"], hparams["table"])
    assert exact["nan"] != exact["nan"]


def test_an_open_file_is_verified_where_it_can_be_read_twice(tmp_path: Path) -> None:
    path, io_ = tmp_path / "a.ckpt", TorchCheckpointIO()
    io_.save_checkpoint(checkpoint(), path)
    content = bytearray(path.read_bytes())
    assert torch.equal(io_.load_checkpoint(io.BytesIO(content))["state_dict"]["c"], torch.ones(3))
    with path.open("rb") as file:
        assert torch.equal(io_.load_checkpoint(file)["state_dict"]["c"], torch.ones(3))
    content[len(content) // 2] ^= 1  # a weight: torch itself would not see it
    with pytest.raises(CheckpointCorruptError, match=r"<stream>.*state_dict"):
        io_.load_checkpoint(io.BytesIO(content))


def test_what_cannot_be_removed_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").mkdir()
    with pytest.raises(CheckpointRemoveError, match=r"a\.ckpt") as caught:
        TorchCheckpointIO().remove_checkpoint(tmp_path / "a.ckpt")
    assert caught.value.path == str(tmp_path / "a.ckpt")


def test_a_foreign_pickle_is_refused_by_key_path_and_loads_when_asked_to(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"deep": [Custom()]}}, path)
    with pytest.raises(UnsafeCheckpointError, match=r"hyper_parameters\.deep\.0.*Custom.*weights_only=False") as caught:
        TorchCheckpointIO().load_checkpoint(path)
    assert caught.value.key_path == "hyper_parameters.deep.0"
    assert isinstance(
        TorchCheckpointIO().load_checkpoint(path, weights_only=False)["hyper_parameters"]["deep"][0], Custom
    )


def test_refusing_runs_nothing(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"state_dict": {}, "bomb": Bomb()}, tmp_path / "a.ckpt")
    with pytest.raises(UnsafeCheckpointError, match="bomb"):
        TorchCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "exploded").exists()


def test_a_value_that_cannot_be_data_is_saved_loudly_and_found_by_the_dry_run(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    with pytest.raises(UnencodableValueError, match="mine") as caught:
        values.check({"hooks": {"mine": [Custom()]}})
    assert caught.value.key_path == "hooks.mine.0"
    with pytest.warns(UserWarning, match=r"'mine\.0'.*weights_only=False"):
        TorchCheckpointIO().save_checkpoint(checkpoint(mine=[Custom()]), path)
    with pytest.raises(UnsafeCheckpointError, match=r"mine\.0"):
        TorchCheckpointIO().load_checkpoint(path)
    assert isinstance(TorchCheckpointIO().load_checkpoint(path, weights_only=False)["mine"][0], Custom)


def test_missing_link_remove_list(tmp_path: Path) -> None:
    io = TorchCheckpointIO()
    with pytest.raises(CheckpointNotFoundError, match="Checkpoint file not found"):
        io.load_checkpoint(tmp_path / "none.ckpt")
    io.save_checkpoint(checkpoint(), tmp_path / "a.ckpt")
    assert io.link(tmp_path / "a.ckpt", tmp_path / "b.ckpt") and io.link(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    assert (tmp_path / "a.ckpt").samefile(tmp_path / "b.ckpt")
    assert io.list(tmp_path) == [str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt")]
    io.remove_checkpoint(tmp_path / "a.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")
    assert io.exists(tmp_path / "b.ckpt") and not io.exists(tmp_path / "a.ckpt")
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint(checkpoint(), tmp_path / "a.ckpt", storage_options={})


def test_errno_of_the_cause_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointSaveError) as caught:
        TorchCheckpointIO().save_checkpoint(checkpoint(), tmp_path / "file" / "a.ckpt")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno in (errno.ENOTDIR, errno.EEXIST)


def test_what_cannot_even_be_pickled_is_an_error_with_path_and_step(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    with pytest.raises(CheckpointSaveError) as caught:
        TorchCheckpointIO().save_checkpoint({"global_step": 3, "f": lambda: None}, path)
    assert (caught.value.path, caught.value.step) == (str(path), 3)
    assert list(tmp_path.iterdir()) == []


def test_an_array_in_the_other_byte_order_comes_back_exact(tmp_path: Path) -> None:
    array = np.array([1.5, 2.5], dtype=">f8")
    TorchCheckpointIO().save_checkpoint({"a": array}, tmp_path / "a.ckpt")
    loaded = TorchCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["a"]
    assert loaded.dtype == array.dtype and loaded.tolist() == [1.5, 2.5]


def test_what_a_killed_save_left_is_swept_and_a_save_under_way_is_not(tmp_path: Path) -> None:
    stale = tmp_path / ".a.ckpt.old.pending"
    stale.write_bytes(b"half")
    with local.replacing(tmp_path / "b.ckpt") as under_way:
        under_way.write(b"whole")
        TorchCheckpointIO().save_checkpoint(checkpoint(), tmp_path / "a.ckpt")
        assert not stale.exists()
    assert (tmp_path / "b.ckpt").read_bytes() == b"whole"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt", "b.ckpt"]


def test_saves_at_once_in_one_directory_do_not_sweep_each_other_away(tmp_path: Path) -> None:
    failed: list[Exception] = []

    def save(name: str) -> None:
        for _ in range(100):
            try:
                with local.replacing(tmp_path / name) as file:
                    file.write(b"whole")
            except CheckpointSaveError as error:
                failed.append(error)

    threads = [threading.Thread(target=save, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_pickle_edited_by_hand_is_an_error_of_ours_at_worst(tmp_path: Path) -> None:
    """The records' checksums are made to fit, as they would by whoever edits a file with care."""
    source = io.BytesIO()
    state = checkpoint(hyper_parameters={"where": Path("x"), "options": Options(1, Path("y")), "n": np.float64(1)})
    torch.save(values.to_plain(state), source)
    with zipfile.ZipFile(source) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    generator, whole = random.Random(0), records[pickled]
    path, unread = tmp_path / "a.ckpt", 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            position = generator.randrange(len(content))
            how = generator.randrange(3)
            content[position : position + (how != 1)] = bytes([generator.randrange(256)] * (how != 2))
        with zipfile.ZipFile(path, "w") as archive:
            for name, record in {**records, pickled: bytes(content)}.items():
                archive.writestr(name, record)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                TorchCheckpointIO().load_checkpoint(path)
            except CheckpointError:
                unread += 1
    assert unread > 60


def test_a_subclass_with_an_init_of_its_own_need_not_call_ours(tmp_path: Path) -> None:
    class Counting(TorchCheckpointIO):
        def __init__(self) -> None:
            self.saves = 0

        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            self.saves += 1
            super().save_checkpoint(checkpoint, path, storage_options)

    plugin = Counting()
    plugin.save_checkpoint(checkpoint(), tmp_path / "a.ckpt")
    assert plugin.saves == 1 and plugin.load_checkpoint(tmp_path / "a.ckpt")["global_step"] == 7
    with pytest.raises(UnencodableValueError):
        plugin.check({"a": object()})
