"""`SnapshotCheckpointIO` under the Trainer: exact resume, retention, damage passed over, pickles on demand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from test_exact_resume import Net, Points, everything, loader
from torch.utils.data import DataLoader

from milepost import Trainer
from milepost.callbacks import Callback, ModelCheckpoint
from milepost.errors import CheckpointCorruptError, UnencodableValueError, UnsafeCheckpointError
from milepost.plugins import SnapshotCheckpointIO


class Stop(Exception):
    pass


class StopAt(Callback):
    def __init__(self, batch: int) -> None:
        self.left = batch

    def on_train_batch_start(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stop


def fit(folder: Path, *callbacks: Callback, ckpt_path: str | None = None, io: Any = None) -> tuple[Trainer, Net]:
    torch.manual_seed(5 if ckpt_path is None else 9)
    net = Net()
    trainer = Trainer(
        max_epochs=3, accumulate_grad_batches=3, val_check_interval=4, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, plugins=io or SnapshotCheckpointIO(),
        callbacks=[
            *callbacks,
            ModelCheckpoint(
                folder, "{epoch}-{step}", monitor="loss_step", save_top_k=2, every_n_train_steps=2, save_last=True
            ),
        ],
    )  # fmt: skip
    trainer.fit(net, loader("shuffle", 0, True), DataLoader(Points(False), batch_size=8), ckpt_path=ckpt_path)
    return trainer, net


@pytest.mark.parametrize("background", [True, False])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, background: bool) -> None:
    expected = [t.clone() for t in everything(*fit(tmp_path / "whole"))]
    with pytest.raises(Stop):
        fit(tmp_path / "cut", StopAt(15), io=SnapshotCheckpointIO(background=background))
    trainer, net = fit(tmp_path / "cut", ckpt_path="last")
    for one, other in zip(everything(trainer, net), expected, strict=True):
        assert torch.equal(one, other)
    names = sorted(p.name for p in (tmp_path / "cut").iterdir() if p.is_dir())
    assert "last.ckpt" in names and len(names) == 3, names


def test_last_passes_over_a_damaged_one(tmp_path: Path) -> None:
    fit(tmp_path)
    io = SnapshotCheckpointIO()
    newest = max((p for p in map(Path, io.list(tmp_path))), key=lambda p: (p.stat().st_mtime_ns, p.name == "last.ckpt"))
    blob = newest / "state_dict.safetensors"
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[-5] ^= 1
    blob.write_bytes(data)
    with pytest.raises(CheckpointCorruptError, match=r"state_dict\.net"):
        io.verify(newest)
    with pytest.warns(UserWarning, match="damaged checkpoint"):
        fit(tmp_path, ckpt_path="last")


def test_what_is_no_data_is_refused_or_pickled_on_demand(tmp_path: Path) -> None:
    odd = {"global_step": 3, "odd": {"x": object}}
    io = SnapshotCheckpointIO()
    with pytest.raises(UnencodableValueError, match=r"odd\.x"):
        io.check(odd)
    with pytest.warns(UserWarning, match=r"'odd\.x' is a builtins\.type"):
        io.save_checkpoint(odd, tmp_path / "c").result()
    with pytest.raises(UnsafeCheckpointError, match=r"odd\.x") as caught:
        io.load_checkpoint(tmp_path / "c")
    assert caught.value.key_path == "odd.x"
    assert io.load_checkpoint(tmp_path / "c", weights_only=False) == odd
    willing = SnapshotCheckpointIO(allow_pickle=True)
    willing.check(odd)
    willing.save_checkpoint(odd, tmp_path / "d").result()
    willing.teardown()
    io.teardown()


def test_map_location_takes_what_torch_takes(tmp_path: Path) -> None:
    io = SnapshotCheckpointIO(background=False)
    io.save_checkpoint({"state_dict": {"w": torch.ones(3)}, "list": [torch.zeros(2)]}, tmp_path / "c")
    for where in (torch.device("meta"), "meta", {"cpu": "meta"}):
        found = io.load_checkpoint(tmp_path / "c", map_location=where)
        assert found["state_dict"]["w"].is_meta and found["list"][0].is_meta
    for stay in (lambda storage, place: storage, "cpu", {"cuda:0": "cpu"}):
        assert io.load_checkpoint(tmp_path / "c", map_location=stay)["state_dict"]["w"].device.type == "cpu"


def test_a_second_name_is_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    io = SnapshotCheckpointIO(background=False)
    io.save_checkpoint({"w": torch.ones(300_000)}, tmp_path / "a")
    assert io.link(tmp_path / "a", tmp_path / "b") and io.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").samefile(tmp_path / "b" / "model.safetensors")
    io.remove_checkpoint(tmp_path / "a")
    io.verify(tmp_path / "b")
    assert io.list(tmp_path) == [str(tmp_path / "b")] and not io.exists(tmp_path / "a")


def test_what_is_being_replaced_is_there(tmp_path: Path) -> None:
    """Where two directories cannot be exchanged, the old one has another name until the new one is durable."""
    io = SnapshotCheckpointIO(background=False)
    io.save_checkpoint({"n": 1}, tmp_path / "a")
    io.save_checkpoint({"n": 2}, tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / ".replaced-a")
    assert io.exists(tmp_path / "a") and not io.exists(tmp_path / "c")
    assert io.list(tmp_path) == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert io.load_checkpoint(tmp_path / "a") == {"n": 1}
    io.teardown()
