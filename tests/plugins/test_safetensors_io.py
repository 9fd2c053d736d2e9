"""`SafetensorsCheckpointIO`: weights that every tool reads, the rest beside them, one commit for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset

from milepost import LightningModule, Trainer
from milepost.callbacks import ModelCheckpoint
from milepost.errors import CheckpointCorruptError, CheckpointFormatError
from milepost.plugins import SafetensorsCheckpointIO


def checkpoint(step: int = 1) -> dict[str, Any]:
    weight = torch.randn(300, 500)
    return {
        "global_step": step, "state_dict": {"a": weight, "tied": weight, "half": torch.ones(5).bfloat16()},
        "optimizer_states": [{"moment": torch.randn(300, 500)}], "note": "x",
    }  # fmt: skip


def test_other_tools_read_the_weights_and_all_comes_back(tmp_path: Path) -> None:
    io, state, path = SafetensorsCheckpointIO(), checkpoint(), tmp_path / "m.safetensors"
    io.save_checkpoint(state, path)
    weights = load_file(path)
    assert torch.equal(weights["a"], state["state_dict"]["a"]) and weights["half"].dtype == torch.bfloat16
    with safe_open(path, "pt") as opened:
        assert opened.metadata()["format"] == "pt"
    found = io.load_checkpoint(path)
    assert list(found) == list(state) and list(found["state_dict"]) == list(state["state_dict"])
    assert found["state_dict"]["tied"] is found["state_dict"]["a"]
    assert torch.equal(found["optimizer_states"][0]["moment"], state["optimizer_states"][0]["moment"])
    io.teardown()


def test_a_file_that_others_wrote_loads_as_weights(tmp_path: Path) -> None:
    save_file({"w": torch.arange(4)}, tmp_path / "o.safetensors")
    io = SafetensorsCheckpointIO()
    found = io.load_checkpoint(tmp_path / "o.safetensors")
    assert found.keys() == {"state_dict"} and torch.equal(found["state_dict"]["w"], torch.arange(4))
    assert io.verify(tmp_path / "o.safetensors") == "cannot"


def test_replacing_and_removing_leave_nothing(tmp_path: Path) -> None:
    io = SafetensorsCheckpointIO()
    for step in range(3):
        io.save_checkpoint(checkpoint(step), tmp_path / "m.safetensors")
    assert len(list(tmp_path.iterdir())) == 2 and io.load_checkpoint(tmp_path / "m.safetensors")["global_step"] == 2
    assert io.list(tmp_path) == [str(tmp_path / "m.safetensors")]
    io.remove_checkpoint(tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["m.safetensors", "rest"])
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    io = SafetensorsCheckpointIO()
    path = tmp_path / "m.safetensors"
    io.save_checkpoint(checkpoint(), path)
    io.verify(path)
    target = path if name == "m.safetensors" else next(tmp_path.glob("*.rest-*")) / "checkpoint.safetensors"
    if not target.exists():
        target = next(next(tmp_path.glob("*.rest-*")).glob("*.safetensors"))
    target.chmod(0o644)
    data = bytearray(target.read_bytes())
    data[-7] ^= 1
    target.write_bytes(data)
    for read in (io.verify, io.load_checkpoint):
        with pytest.raises(CheckpointCorruptError, match="half" if target == path else "moment"):
            read(path)


def test_a_file_without_its_rest_and_one_that_is_none(tmp_path: Path) -> None:
    io = SafetensorsCheckpointIO()
    io.save_checkpoint(checkpoint(), tmp_path / "m.safetensors")
    next(tmp_path.glob("*.rest-*")).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointCorruptError, match="Move the two together"):
        io.load_checkpoint(tmp_path / "m.safetensors")
    for evil in (b"", b"\xff" * 100, (2**40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"):
        (tmp_path / "e.safetensors").write_bytes(evil)
        with pytest.raises(CheckpointFormatError, match="no safetensors file"):
            io.load_checkpoint(tmp_path / "e.safetensors")


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Saves(ModelCheckpoint):
    FILE_EXTENSION = ".safetensors"


def fit(folder: Path, epochs: int, ckpt_path: str | None = None) -> Net:
    torch.manual_seed(0)
    net = Net()
    trainer = Trainer(
        max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        plugins=SafetensorsCheckpointIO(), callbacks=Saves(folder, "{epoch}", save_last=True), accelerator="cpu",
    )  # fmt: skip
    trainer.fit(net, DataLoader(TensorDataset(torch.randn(8, 2)), batch_size=2, shuffle=True), ckpt_path=ckpt_path)
    return net


def test_under_the_trainer_a_resumed_run_is_the_unbroken_one(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "cut", 2)
    resumed = fit(tmp_path / "cut", 4, "last")
    assert torch.equal(whole.layer.weight, resumed.layer.weight)
    names = sorted(p.name for p in (tmp_path / "cut").iterdir() if p.is_file() and p.suffix == ".safetensors")
    assert names == ["epoch=3.safetensors", "last.safetensors"]
    assert torch.equal(load_file(tmp_path / "cut" / "last.safetensors")["layer.weight"], resumed.layer.weight)
