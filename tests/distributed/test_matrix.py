"""Saved in any layout, loaded in any layout: equal bit for bit, and no piece read that is not needed."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matrix
import pytest
import shard_writer
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from milepost import _distributed
from milepost._distributed import OfAllRanks, PerRank
from milepost.cli.main import main
from milepost.engine.directory import DirectoryEngine
from milepost.engine.reader import StoredCheckpoint
from milepost.engine.restore import collect, restore
from milepost.engine.votes import Ranks
from milepost.errors import CheckpointCorruptError

DAMAGED = "damaged"
ENGINE = ", by the engine"
SAVED = ["fsdp4", "fsdp2 tp2", *(f"{saver}{ENGINE}" for saver in matrix.SAVERS)]
"""Two of them by the tests' own writer: what it lays out otherwise than the engine does is loaded too."""


def collectives_called() -> int:
    """How many so far in the process group, which counts them itself."""
    if not torch.distributed.is_initialized():
        return 0
    count: int = torch.distributed.distributed_c10d._get_default_group()._get_sequence_number_for_group()
    return count


def save(folder: Path, layout: str) -> None:
    run = matrix.Run(layout, seed=1)
    for _ in range(2):
        run.train()
    rank, ranks = _distributed.rank(), _distributed.world_size()
    shard_writer.write(folder / layout, collect(run.state), 2, [{"rank": rank}], rank, ranks)
    collectives = collectives_called()
    engine = DirectoryEngine(ranks=Ranks.of_process_group())
    saved = {**collect(run.state), "own": PerRank([{"rank": rank}])}
    engine.save(folder / f"{layout}{ENGINE}", saved, step=2)
    engine.close()
    assert collectives_called() == collectives
    whole = run.whole()
    if rank == 0:
        torch.save(whole, folder / f"{layout}.pt")
    (folder / f"{layout} {rank}.loss").write_text(str(run.train()))


def load(folder: Path, layout: str) -> None:
    """All savers' checkpoints, one after the other. What was found is written down for the tests."""
    engine, found = DirectoryEngine(), {}
    for saver in SAVED:
        run = matrix.Run(layout, seed=5)
        state = {**run.state, "own": None}
        with engine.open(folder / saver) as stored:
            restore(engine, stored, state)
            read = matrix.pieces_read(stored)
            indexes = len(stored._indexes)
            needed = matrix.pieces_needed(stored, matrix.by_name(collect(run.state)))
        whole, expected = run.whole(), torch.load(folder / f"{saver.removesuffix(ENGINE)}.pt")
        found[saver] = {
            "unequal": [n for n in expected if n not in whole or not torch.equal(whole[n], expected[n])],
            "more": sorted(set(whole) - set(expected)),
            "twice": [piece for piece, times in read.items() if times > 1],
            "not needed": sorted(set(read) - needed),
            "pieces": len(read),
            "indexes": indexes,
            "own": repr(state["own"]),
            "loss": run.train(),
        }
    (folder / f"loaded {layout} {_distributed.rank()}.json").write_text(json.dumps(found))
    engine.close()


def load_damaged(folder: Path, layout: str) -> None:
    """A checkpoint in which one bit of rank 3's part of the embedding is flipped."""
    rank, found = _distributed.rank(), None
    if rank == 0:
        shutil.copytree(folder / "fsdp4", folder / DAMAGED)
        flip(folder / DAMAGED / "model-r00003.safetensors", "embedding.weight")
    torch.distributed.barrier()
    run = matrix.Run(layout, seed=5)
    engine = DirectoryEngine()
    try:
        with engine.open(folder / DAMAGED) as stored:
            restore(engine, stored, run.state)
    except CheckpointCorruptError as error:
        found = {"tensor": error.tensor, "range": error.byte_range, "path": str(error.path)}
    (folder / f"damaged {layout} {rank}.json").write_text(json.dumps(found))
    engine.close()


def flip(blob: Path, name: str) -> int:
    """Flip a bit in the middle of a tensor. Returns where."""
    index = json.loads(blob.with_name(blob.name.replace(".safetensors", ".index.json")).read_bytes())
    row = next(n for n, each in enumerate(index["names"]) if each.startswith(name))
    at = index["starts"][row] + 10
    data = bytearray(blob.read_bytes())
    data[at] ^= 8
    blob.chmod(0o644)
    blob.write_bytes(data)
    return at


PHASES = [
    *((f"save: {name}", size, save) for name, size in matrix.SAVERS.items()),
    *((f"load: {name}", size, load) for name, size in matrix.LOADERS.items()),
    ("damaged: fsdp4", 4, load_damaged),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    made: Path = tmp_path_factory.mktemp("matrix")
    mp.spawn(matrix.one_process, (made, PHASES), nprocs=4)
    return made


def results(folder: Path, loader: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for rank in range(matrix.LOADERS[loader]):
        yield rank, json.loads((folder / f"loaded {loader} {rank}.json").read_text())


@pytest.mark.parametrize("loader", matrix.LOADERS)
@pytest.mark.parametrize("saver", SAVED)
def test_any_layout_is_loaded_by_any_layout(folder: Path, saver: str, loader: str) -> None:
    for _, by_saver in results(folder, loader):
        result = by_saver[saver]
        assert (result["unequal"], result["more"]) == ([], [])
        assert (result["twice"], result["not needed"]) == ([], [])
        assert result["pieces"] > 0
        layout = saver.removesuffix(ENGINE)
        if layout == loader:  # training goes on as it does where it was saved
            assert result["loss"] == float((folder / f"{layout} 0.loss").read_text())


@pytest.mark.parametrize("saver", matrix.SAVERS)
def test_the_engine_writes_each_byte_once_and_as_much_on_each_rank(folder: Path, saver: str) -> None:
    whole = torch.load(folder / f"{saver}.pt")
    total = sum(tensor.numel() * tensor.element_size() for tensor in whole.values())
    with StoredCheckpoint(folder / f"{saver}{ENGINE}") as stored:
        written: dict[Any, int] = {}
        for number, blob in enumerate(stored.head.blobs):
            size = sum(entry.size for entry in stored.index(number).entries())
            written[blob.rank] = written.get(blob.rank, 0) + size
    assert sum(written.values()) == total and len(written) == matrix.SAVERS[saver]
    assert max(written.values()) <= 1.05 * total / len(written), written


def test_a_rank_that_loads_what_it_saved_reads_no_index_of_another_but_for_what_is_replicated(folder: Path) -> None:
    for rank, by_saver in results(folder, "fsdp4"):
        assert by_saver["fsdp4"]["indexes"] == (2 if rank == 0 else 4)
        assert by_saver[f"single{ENGINE}"]["indexes"] == 2


def test_each_rank_gets_its_own_values_and_another_number_of_ranks_gets_all(folder: Path) -> None:
    for rank, by_saver in results(folder, "fsdp4"):
        assert by_saver["fsdp2 tp2"]["own"] == repr([{"rank": rank}])
        assert by_saver[f"fsdp2 tp2{ENGINE}"]["own"] == repr([{"rank": rank}])
        assert by_saver[f"fsdp2{ENGINE}"]["own"] == repr(OfAllRanks(([{"rank": 0}], [{"rank": 1}])))


def test_damage_is_named_by_the_rank_that_needs_the_piece(folder: Path) -> None:
    found = [json.loads((folder / f"damaged fsdp4 {rank}.json").read_text()) for rank in range(4)]
    assert found[:3] == [None, None, None]
    assert found[3]["tensor"].startswith("model.embedding.weight[") and found[3]["path"].endswith(
        "model-r00003.safetensors"
    )


@pytest.mark.parametrize("saver", ["fsdp4", "fsdp2 tp2"])
def test_one_process_assembles_what_many_saved(folder: Path, saver: str) -> None:
    engine = DirectoryEngine()
    state = engine.load(folder / saver)
    expected = torch.load(folder / f"{saver}.pt")
    assert all(torch.equal(tensor, expected[f"model.{name}"]) for name, tensor in state["model"].items())
    moments = [item["exp_avg"] for item in state["optimizer"]["state"].values()]
    assert sum(m.numel() for m in moments) == sum(t.numel() for n, t in expected.items() if n.endswith(".exp_avg"))
    engine.verify(folder / saver)
    engine.close()


def test_every_blob_of_every_rank_is_verified(folder: Path, tmp_path: Path) -> None:
    engine = DirectoryEngine()
    with StoredCheckpoint(folder / "fsdp4") as stored:
        blobs = [blob.name for blob in stored.head.blobs]
    assert len(blobs) == 8
    for number, name in enumerate(blobs):
        damaged = tmp_path / str(number)
        shutil.copytree(folder / "fsdp4", damaged)
        tensor = "state.0.exp_avg" if name.startswith("optimizer") else "embedding"
        at = flip(damaged / name, tensor)
        for use in (engine.verify, engine.load):
            with pytest.raises(CheckpointCorruptError, match=f"{tensor}.*\\[") as caught:
                use(damaged)
            low, high = caught.value.byte_range
            assert low <= at < high and str(caught.value.path).endswith(name)
    engine.close()


def test_the_commands_show_whole_tensors_once_with_their_parts(folder: Path, capsys: Any, tmp_path: Path) -> None:
    path = str(folder / "fsdp4")
    assert main(["show", path, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    embedding = shown["tensors"]["model.embedding.weight"]
    assert embedding["shape"] == [matrix.VOCABULARY, matrix.WIDTH] and len(embedding["parts"]) == 4
    assert embedding["parts"][1]["offsets"] == [1501, 0] and embedding["parts"][1]["file"] == "model-r00001.safetensors"
    assert not any("[" in name for name in shown["tensors"])
    assert shown["values"]["own.0 (rank 2).rank"] == "2"
    assert main(["show", path]) == 0
    assert "4 parts" in capsys.readouterr().out
    assert main(["verify", path]) == 0
    assert main(["ls", str(folder)]) == 0
    capsys.readouterr()


def test_the_commands_compare_and_convert_across_layouts(folder: Path, capsys: Any, tmp_path: Path) -> None:
    source = folder / "fsdp2 tp2"
    for target in ("one", "one.ckpt", "one.safetensors"):
        assert main(["convert", str(source), str(tmp_path / target)]) == 0
    capsys.readouterr()
    assert main(["diff", str(source), str(tmp_path / "one"), "--json"]) == 1
    changes = json.loads(capsys.readouterr().out)
    assert {change["kind"] for change in changes} == {"values"}  # those that each rank had of its own
    assert all(change["name"].startswith("own") for change in changes)
    assert main(["diff", str(folder / "single"), str(source), "--json"]) == 1
    changed = {change["name"] for change in json.loads(capsys.readouterr().out) if change["kind"] == "changed"}
    assert "model.embedding.weight" in changed or "model.blocks.0.up.weight" in changed
    weights = load_file(tmp_path / "one.safetensors")
    expected = torch.load(folder / "fsdp2 tp2.pt")
    assert all(torch.equal(weights[n.removeprefix("model.")], t) for n, t in expected.items() if n.startswith("model."))
    with zipfile.ZipFile(tmp_path / "one.ckpt") as archive:
        assert archive.testzip() is None
