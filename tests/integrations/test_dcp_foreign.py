"""What torch.distributed.checkpoint and Lightning saved: read and converted, and nothing of it is run."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.utils.data import DataLoader, TensorDataset

from milepost import Checkpointer, LightningModule, Trainer
from milepost.cli.main import main
from milepost.engine.directory import DirectoryEngine
from milepost.errors import CheckpointCorruptError, CheckpointError, CheckpointFormatError, UnsafeCheckpointError
from milepost.format import distcp
from milepost.format.distcp_files import DistcpFiles
from milepost.integrations.dcp import load_distcp
from milepost.plugins import TorchCheckpointIO

SHARDED = Path(__file__).parents[1] / "compat/sharded_lightning"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Detected an existing")


class Strange:
    """No data."""


def a_state() -> dict[str, Any]:
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return {
        "net": net, "optimizer": optimizer.state_dict(), "step": 3, "pair": (1, "a"), "mixed": [torch.ones(2), 3],
        "half": torch.arange(3).bfloat16(), "eight": torch.ones(3).to(torch.float8_e4m3fn), "none": torch.empty(0, 2),
        "wide": torch.tensor([1 + 2j], dtype=torch.complex128), "turned": torch.arange(6.0).reshape(2, 3).T,
    }  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    dcp.save(a_state(), checkpoint_id=tmp_path / "theirs")
    return tmp_path / "theirs"


def assert_equal(made: dict[str, Any], state: dict[str, Any]) -> None:
    torch.testing.assert_close(made["net"], dict(state["net"].state_dict()), rtol=0, atol=0)
    for name in ("half", "none", "wide", "turned"):
        torch.testing.assert_close(made[name], state[name], rtol=0, atol=0)
    assert made["eight"].dtype == torch.float8_e4m3fn and made["eight"].float().tolist() == [1, 1, 1]
    assert (made["step"], made["pair"], made["mixed"][1]) == (3, (1, "a"), 3)
    moment = state["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(made["optimizer"]["state"]["0"]["exp_avg"], moment)
    assert made["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]


def test_a_checkpoint_of_dcp_is_loaded_and_nothing_is_unpickled(saved: Path, unpickled: list[str]) -> None:
    assert_equal(load_distcp(saved), a_state())
    assert unpickled == []


def test_it_is_converted_listed_shown_and_compared(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in ("ours", "ours.ckpt"):
        assert main(["convert", str(saved), str(saved.parent / target)]) == 0
        assert main(["diff", str(saved), str(saved.parent / target)]) == 0
    engine = DirectoryEngine()
    assert_equal(engine.load(saved.parent / "ours"), a_state())
    engine.close()
    capsys.readouterr()
    assert main(["show", str(saved), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["form"] == "dcp" and shown["values"]["step"] == "3"
    assert shown["tensors"]["net.weight"] == {"dtype": "F32", "shape": [3, 4], "size_bytes": 48}
    assert main(["ls", str(saved.parent)]) == 0 and "dcp" in capsys.readouterr().out
    assert main(["verify", str(saved)]) == 0


def test_a_flipped_bit_is_found_and_named(saved: Path) -> None:
    (file,) = saved.glob("*.distcp")
    data = bytearray(file.read_bytes())
    place = data.find(a_state()["net"].weight.detach().numpy().tobytes())
    data[place + 5] ^= 4
    file.write_bytes(data)
    dcp.load({"net": torch.nn.Linear(4, 3)}, checkpoint_id=saved)  # theirs takes it
    with pytest.raises(CheckpointCorruptError, match=r"net\.weight") as caught:
        load_distcp(saved)
    assert caught.value.tensor == "net.weight"
    assert main(["verify", str(saved)]) == 1
    file.write_bytes(data[:-10])
    with pytest.raises(CheckpointCorruptError, match="were written"):
        load_distcp(saved)


def test_a_pickled_value_is_refused_by_its_key_path_and_loaded_on_demand(tmp_path: Path) -> None:
    dcp.save({"a": {"strange": [Strange()]}, "n": 1}, checkpoint_id=tmp_path / "p")
    with pytest.raises(UnsafeCheckpointError, match="Strange") as caught:
        load_distcp(tmp_path / "p")
    assert caught.value.key_path == "a.strange.0"
    assert isinstance(load_distcp(tmp_path / "p", unpickle=True)["a"]["strange"][0], Strange)
    assert main(["convert", str(tmp_path / "p"), str(tmp_path / "q")]) == 2


class Evil:
    def __reduce__(self) -> Any:
        return print, ("it ran",)


def described(**changes: Any) -> bytes:
    whole = TensorStorageMetadata(
        TensorProperties(torch.float32), torch.Size([4]), [ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))]
    )
    info = dcp.filesystem._StorageInfo("__0_0.distcp", 0, 100)
    fields = {"state_dict_metadata": {"w": whole}, "storage_data": {MetadataIndex("w", [0]): info}, **changes}
    return pickle.dumps(Metadata(**fields))


@pytest.mark.parametrize(
    "data",
    [
        described(planner_data={"w": Evil()}),
        described(planner_data={"w": Path.unlink}),
        pickle.dumps(Evil()),
        b"cos\nsystem\n(S'true'\ntR.",
    ],
)
def test_metadata_that_would_run_code_is_refused(
    data: bytes, unpickled: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((UnsafeCheckpointError, CheckpointFormatError)):
        distcp.decode(data, "m")
    assert unpickled == [] and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage_data": {}}, "does not say where"),
        ({"storage_data": {MetadataIndex("w", [0]): dcp.filesystem._StorageInfo("../x", 0, 100)}}, "in the file"),
        ({"storage_data": {MetadataIndex("w", [0]): dcp.filesystem._StorageInfo("f", -1, 100)}}, "at bytes -1"),
        ({"storage_data": {MetadataIndex("w", [0]): dcp.filesystem._StorageInfo("f", 0, 100, ["zstd"])}}, "zstd"),
        ({"state_dict_metadata": {"w": 3}}, "no TensorStorageMetadata"),
        ({"planner_data": {"w": ()}}, "key path"),
    ],
)
def test_metadata_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / ".metadata").write_bytes(described(**changes))
    (tmp_path / "f").write_bytes(bytes(100))
    with pytest.raises(CheckpointFormatError, match=message):
        DistcpFiles(tmp_path)


def endless() -> Any:
    """A few hundred bytes of a pickle that are endless as text, and to be hashed."""
    made: Any = ()
    for _ in range(60):
        made = (made, made)
    return made


def one_chunk(**changes: Any) -> dict[str, Any]:
    size = torch.Size([4])
    fields = {"properties": TensorProperties(torch.float32), "size": size, "chunks": [ChunkStorageMetadata(size, size)]}
    return {"state_dict_metadata": {"w": TensorStorageMetadata(**{**fields, **changes})}}


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "changes",
    [
        {"planner_data": {"w": endless()}},
        {"planner_data": endless()},
        {"state_dict_metadata": {"w": endless()}},
        {"storage_data": {MetadataIndex("w", [0]): dcp.filesystem._StorageInfo(endless(), 0, 100)}},
        {"storage_data": {MetadataIndex("w", [0]): dcp.filesystem._StorageInfo("f", endless(), 100)}},
        {"storage_data": {MetadataIndex("w", [0]): dcp.filesystem._StorageInfo("f", 0, 100, endless())}},
        one_chunk(size=endless()),
        one_chunk(properties=TensorProperties(endless())),
        one_chunk(chunks=endless()),
    ],
)
def test_metadata_that_would_take_forever_is_refused_at_once(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointFormatError):
        distcp.decode(described(**changes), "m")


def test_a_size_that_no_file_can_hold_takes_no_memory(tmp_path: Path) -> None:
    size = torch.Size([1 << 40])
    huge = TensorStorageMetadata(TensorProperties(torch.float32), size, [ChunkStorageMetadata(torch.Size([0]), size)])
    (tmp_path / ".metadata").write_bytes(described(state_dict_metadata={"w": huge}))
    (tmp_path / "__0_0.distcp").write_bytes(bytes(100))
    with pytest.raises(CheckpointFormatError, match="cannot hold"):
        load_distcp(tmp_path)


def test_any_change_of_a_byte_of_the_metadata_is_refused_or_read_as_what_it_says(saved: Path) -> None:
    data = (saved / ".metadata").read_bytes()
    for place in range(0, len(data), 29):
        mutated = bytearray(data)
        mutated[place] ^= 1 << place % 8
        (saved / ".metadata").write_bytes(mutated)
        try:
            DistcpFiles(saved).close()
        except CheckpointError:
            continue


def lightning_checkpoint(folder: Path, weights: str) -> tuple[dict[str, Any], torch.nn.Module]:
    """As Lightning's FSDPStrategy (``model``) and ModelParallelStrategy (``state_dict``) save them."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 3))
    moments = {"0.weight": {"exp_avg": torch.ones(3, 4)}, "0.bias": {"exp_avg": torch.zeros(3)}}
    optimizer = {"state": moments, "param_groups": [{"lr": 0.5, "params": ["0.weight", "0.bias"]}]}
    dcp.save({weights: net.state_dict(), "optimizer_0": optimizer}, checkpoint_id=folder)
    rest = {"epoch": 2, "global_step": 17, "pytorch-lightning_version": "2.6.6", "loops": {}, "callbacks": {}}
    torch.save(rest, folder / "meta.pt")
    return rest, net


@pytest.mark.parametrize("weights", ["model", "state_dict"])
def test_lightnings_sharded_checkpoint_becomes_a_ckpt(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rest, net = lightning_checkpoint(tmp_path / "sharded.ckpt", weights)
    assert main(["convert", str(tmp_path / "sharded.ckpt"), str(tmp_path / "whole.ckpt")]) == 0
    made = TorchCheckpointIO().load_checkpoint(tmp_path / "whole.ckpt")
    assert {key: made[key] for key in rest} == rest
    torch.testing.assert_close(made["state_dict"], dict(net.state_dict()), rtol=0, atol=0)
    (stored,) = made["optimizer_states"]
    assert stored["param_groups"][0]["params"] == [0, 1]
    assert torch.equal(stored["state"][0]["exp_avg"], torch.ones(3, 4))
    capsys.readouterr()
    main(["ls", str(tmp_path), "--json"])
    assert {(row["form"], row["step"]) for row in json.loads(capsys.readouterr().out)} == {("ckpt", 17), ("dcp", 17)}
    assert main(["show", str(tmp_path / "sharded.ckpt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 17


class OfLightning(LightningModule):
    """What `write_sharded_file.py` has trained."""

    def __init__(self) -> None:
        super().__init__()
        self.l = torch.nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        found: torch.Tensor = self.l(batch[0]).sum()
        return found

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def test_what_lightning_itself_has_sharded_is_resumed_once_it_is_converted(tmp_path: Path) -> None:
    assert main(["convert", str(SHARDED), str(tmp_path / "whole.ckpt")]) == 0
    state = TorchCheckpointIO().load_checkpoint(tmp_path / "whole.ckpt")
    weight = torch.tensor([[0.0133, -0.1017, 0.3105, 0.0050], [-0.0685, 0.2193, -0.1641, -0.4467]])
    torch.testing.assert_close(state["state_dict"]["l.weight"], weight, rtol=0, atol=1e-4)
    assert (state["global_step"], state["hyper_parameters"]) == (3, {"lr": 0.1})
    module = OfLightning()
    trainer = Trainer(
        max_steps=5, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    data = DataLoader(TensorDataset(torch.ones(16, 4)), batch_size=2)
    trainer.fit(module, data, ckpt_path=tmp_path / "whole.ckpt")
    assert trainer.global_step == 5
    assert float(trainer.optimizers[0].state[module.l.weight]["step"]) == 5
    expected = OfLightning()
    optimizer = expected.configure_optimizers()
    expected.load_state_dict(state["state_dict"])
    optimizer.load_state_dict(state["optimizer_states"][0])
    for _ in range(2):
        expected.l(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(module.l.weight, expected.l.weight)


def test_a_plain_loop_goes_on_from_a_converted_one(saved: Path) -> None:
    assert main(["convert", str(saved), str(saved.parent / "runs" / "step-00000003")]) == 0
    fresh = torch.nn.Linear(4, 3)
    with Checkpointer(saved.parent / "runs") as checkpointer:
        assert checkpointer.restore({"net": fresh}) == 3
    torch.testing.assert_close(fresh.state_dict(), a_state()["net"].state_dict(), rtol=0, atol=0)


def test_ranks_that_saved_by_themselves_are_read_together(saved: Path) -> None:
    (saved / ".metadata").rename(saved / "__0.metadata")
    assert_equal(load_distcp(saved), a_state())


def test_a_slice_is_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    with (tmp_path / "f").open("rb") as file:
        part = distcp.Slice(file, distcp.Item("f", 2, 5))
        assert part.read() == b"23456" and part.read(1) == b""
        assert part.seek(-2, io.SEEK_END) == 3 and part.read(9) == b"56"
