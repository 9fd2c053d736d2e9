"""Saved in any layout, loaded in any layout: equal bit for bit, and no piece read that is not needed."""

from __future__ import annotations

import json
import shutil
import warnings
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
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from milepost import _distributed
from milepost._distributed import OfAllRanks, PerRank
from milepost.cli.main import main
from milepost.data.rng import RandomState
from milepost.engine.checkpointer import Checkpointer
from milepost.engine.directory import DirectoryEngine
from milepost.engine.reader import StoredCheckpoint
from milepost.engine.restore import collect, restore
from milepost.errors import CheckpointCorruptError, MilepostError, RankFailedError

pytestmark = pytest.mark.timeout(300)  # the launch that all tests share takes a minute of a busy machine


def path_of(folder: Path, saver: str, step: int = 2) -> Path:
    return folder / saver / f"step-{step:08d}"


def collectives_called() -> int:
    """How many so far in the process group, which counts them itself."""
    if not torch.distributed.is_initialized():
        return 0
    count: int = torch.distributed.distributed_c10d._get_default_group()._get_sequence_number_for_group()
    return count


def save(folder: Path, saver: str) -> None:
    layout = saver.removeprefix("page: ")
    run = matrix.Run(layout, seed=1)
    rank, ranks = _distributed.rank(), _distributed.world_size()
    own = PerRank({"rank": rank, "random": torch.full((3,), rank)})
    for step in (1, 2):
        run.train()
        if layout == saver:
            collectives = collectives_called()
            with Checkpointer(folder / saver) as checkpointer:
                checkpointer.save(step, {**run.state, "own": own})
            assert collectives_called() == collectives
    if layout != saver:
        shard_writer.write(path_of(folder, saver), collect(run.state), 2, [own.value["rank"]], rank, ranks)
    whole = run.whole()
    if rank == 0:
        torch.save(whole, folder / f"{saver}.pt")
    (folder / f"{saver} {rank}.loss").write_text(str(run.train()))


def load(folder: Path, layout: str) -> None:
    """All savers' checkpoints, one after the other. What was found is written down for the tests."""
    engine, found = DirectoryEngine(), {}
    for saver in (saver for saver, loader in matrix.PAIRS if loader == layout):
        run = matrix.Run(layout, seed=5)
        state = {**run.state, "own": None}
        with engine.open(path_of(folder, saver)) as stored:
            restore(engine, stored, state)
            read = matrix.pieces_read(stored)
            own = set(stored._indexes)
            needed = matrix.pieces_needed(stored, matrix.by_name(collect(run.state)))
        whole, expected = run.whole(), torch.load(folder / f"{saver}.pt")
        found[saver] = {
            "unequal": [n for n in expected if n not in whole or not torch.equal(whole[n], expected[n])],
            "more": sorted(set(whole) - set(expected)),
            "twice": [piece for piece, times in read.items() if times > 1],
            "not needed": sorted(set(read) - needed),
            "pieces": len(read),
            "indexes": len(own),
            "own": repr(state["own"]),
            "loss": run.train(),
        }
    (folder / f"loaded {layout} {_distributed.rank()}.json").write_text(json.dumps(found))
    engine.close()


def narrow(folder: Path, layout: str) -> None:
    """Moments of another type than their parameters; the optimizer that takes them has made no step."""
    net, optimizer = narrow_model()
    for parameter in net.parameters():
        local = torch.rand(parameter.to_local().shape)
        size = {"shape": parameter.shape, "stride": parameter.stride()}
        moment = DTensor.from_local(local, parameter.device_mesh, parameter.placements, **size)
        optimizer.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": moment}
    fresh, other = narrow_model()
    with Checkpointer(folder / "narrow") as checkpointer:
        checkpointer.save(1, {"model": net, "optimizer": optimizer}, wait=True)
        checkpointer.restore({"model": fresh, "optimizer": other})
    for one, two in zip(net.parameters(), fresh.parameters(), strict=True):
        saved, found = optimizer.state[one]["exp_avg"], other.state[two]["exp_avg"]
        assert found.dtype == torch.float32 and two.dtype == torch.bfloat16
        assert found.placements == two.placements and found.shape == two.shape
        assert torch.equal(found.to_local(), saved.to_local()) and torch.equal(one.to_local(), two.to_local())
        assert type(other.state[two]["step"]) is torch.Tensor and other.state[two]["step"] == 3


def narrow_model() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    net = torch.nn.Linear(33, 6).to(torch.bfloat16)
    fully_shard(net)
    return net, torch.optim.AdamW(net.parameters())


def marks(folder: Path, layout: str) -> None:
    """What each rank has of its own comes back to it; where another number of ranks saved, all of it."""
    rank, found = _distributed.rank(), {}
    for saver in ("single", "fsdp2", "fsdp4"):
        state: dict[str, Any] = {"own": PerRank(None)}
        with Checkpointer(folder / saver) as checkpointer:
            checkpointer.restore(state, step=2)
        found[saver] = repr(state["own"])
    (folder / f"marks {rank}.json").write_text(json.dumps(found))
    torch.manual_seed(100 + rank)
    with Checkpointer(folder / "random") as checkpointer:
        checkpointer.save(1, {"random": RandomState()}, wait=True)
        drawn = torch.rand(3)
        checkpointer.restore({"random": RandomState()})
        assert torch.equal(torch.rand(3), drawn)
    torch.save(drawn, folder / f"drawn {rank}.pt")


def fewer(folder: Path, layout: str) -> None:
    """Three of the four random states go on where they were; and then a rank does not come to a restore."""
    rank = _distributed.rank()
    with Checkpointer(folder / "random") as checkpointer:
        checkpointer.restore({"random": RandomState()})
    assert torch.equal(torch.rand(3), torch.load(folder / f"drawn {rank}.pt"))
    torch.distributed.barrier()
    with Checkpointer(folder / "random", rank_deadline_seconds=5.0) as checkpointer:
        if rank != 2:
            with pytest.raises(RankFailedError, match="rank 2 failed: it has not") as caught:
                checkpointer.restore({"random": RandomState()})
            assert caught.value.rank == 2
        torch.distributed.barrier()


def agree(folder: Path, layout: str) -> None:
    """All ranks together: of two checkpoints the newer is damaged where only one rank looks; what follows from it."""
    rank = _distributed.rank()
    if rank == 0:
        shutil.copytree(folder / "fsdp4", folder / "damaged")
        name, rank_of_it = sharded_alone(path_of(folder, "damaged"))
        flip(path_of(folder, "damaged") / name, "")
        (folder / "damaged.json").write_text(json.dumps([name, rank_of_it]))
    torch.distributed.barrier()
    found: dict[str, Any] = {}
    with Checkpointer(folder / "damaged") as checkpointer:
        run = matrix.Run(layout, seed=5)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found["newest good"] = checkpointer.restore(run.state)
        found["warned"] = [str(w.message) for w in warned]
        found["seen"] = int(run.model.seen)
        for what, state, step in (
            ("the damaged one", run.state, 2),
            ("none", run.state, 77),
            ("another state", {"model": torch.nn.Linear(2, 2)} if rank == 1 else run.state, 1),
        ):
            try:
                checkpointer.restore(state, step=step)
            except (MilepostError, OSError) as error:
                found[what] = [type(error).__name__, str(error), getattr(error, "tensor", None)]
        found["again"] = checkpointer.restore(run.state, step=1)
    (folder / f"agreed {rank}.json").write_text(json.dumps(found))


def sharded_alone(path: Path) -> tuple[str, int]:
    """A blob that holds nothing but parts of tensors, which only the rank needs that has written it."""
    with StoredCheckpoint(path) as stored:
        for number, blob in enumerate(stored.head.blobs):
            index = stored.index(number)
            if blob.group == "model" and blob.rank and len(index.boxes) == len(index.names):
                return blob.name, blob.rank
    raise AssertionError("no such blob")


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
    ("agree: fsdp4", 4, agree),
    ("moments: narrow", 4, narrow),
    ("marks: fsdp4", 4, marks),
    ("fewer: fsdp3", 3, fewer),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    made: Path = tmp_path_factory.mktemp("matrix")
    mp.spawn(matrix.one_process, (made, PHASES), nprocs=4)
    return made


def results(folder: Path, loader: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for rank in range(matrix.LOADERS[loader]):
        yield rank, json.loads((folder / f"loaded {loader} {rank}.json").read_text())


@pytest.mark.parametrize(("saver", "loader"), matrix.PAIRS)
def test_any_layout_is_loaded_by_any_layout(folder: Path, saver: str, loader: str) -> None:
    for _, by_saver in results(folder, loader):
        result = by_saver[saver]
        assert (result["unequal"], result["more"]) == ([], [])
        assert (result["twice"], result["not needed"]) == ([], [])
        assert result["pieces"] > 0
        if saver == loader:  # training goes on as it does where it was saved
            assert result["loss"] == float((folder / f"{saver} 0.loss").read_text())


@pytest.mark.parametrize("saver", [saver for saver in matrix.SAVERS if ":" not in saver])
def test_the_engine_writes_each_byte_once_and_as_much_on_each_rank(folder: Path, saver: str) -> None:
    whole = torch.load(folder / f"{saver}.pt")
    total = sum(tensor.numel() * tensor.element_size() for tensor in whole.values())
    with StoredCheckpoint(path_of(folder, saver, 1)) as stored:
        written: dict[Any, int] = {}
        for number, blob in enumerate(stored.head.blobs):
            entries = stored.index(number).entries()
            size = sum(entry.size for entry in entries if not entry.name.startswith("own"))
            written[blob.rank] = written.get(blob.rank, 0) + size
    assert sum(written.values()) == total and len(written) == matrix.SAVERS[saver]
    assert max(written.values()) <= 1.05 * total / len(written), written


def test_a_rank_that_loads_what_it_saved_reads_few_indexes_of_others(folder: Path) -> None:
    """Only for what is replicated, which one of the ranks has written."""
    for _, by_saver in results(folder, "fsdp4"):
        assert by_saver["fsdp4"]["indexes"] <= 8
        assert by_saver["single"]["indexes"] == 3


def test_each_rank_gets_its_own_values_and_another_number_of_ranks_gets_all(folder: Path) -> None:
    values = [{"rank": rank, "random": torch.full((3,), rank)} for rank in range(4)]
    for rank, by_saver in results(folder, "fsdp4"):
        assert by_saver["fsdp2 tp2"]["own"] == repr(values[rank])
        assert by_saver["fsdp2"]["own"] == repr(OfAllRanks(tuple(values[:2])))


def test_marked_values_are_given_as_they_were_saved(folder: Path) -> None:
    values = [{"rank": rank, "random": torch.full((3,), rank)} for rank in range(4)]
    for rank in range(4):
        found = json.loads((folder / f"marks {rank}.json").read_text())
        assert found["single"] == repr(PerRank(OfAllRanks((values[0],))))
        assert found["fsdp2"] == repr(PerRank(OfAllRanks(tuple(values[:2]))))
        assert found["fsdp4"] == repr(PerRank(values[rank]))


def test_damage_that_one_rank_finds_sends_all_to_the_next_older_one(folder: Path) -> None:
    found = [json.loads((folder / f"agreed {rank}.json").read_text()) for rank in range(4)]
    assert [each["newest good"] for each in found] == [1] * 4
    assert [each["seen"] for each in found] == [1] * 4
    name, _ = json.loads((folder / "damaged.json").read_text())
    assert all(f"{name} is damaged in bytes" in each["warned"][0] for each in found)


def test_all_ranks_raise_what_one_of_them_found(folder: Path) -> None:
    found = [json.loads((folder / f"agreed {rank}.json").read_text()) for rank in range(4)]
    name, finder = json.loads((folder / "damaged.json").read_text())
    for rank, each in enumerate(found):
        kind, text, tensor = each["the damaged one"]
        assert kind == "CheckpointCorruptError" and f"{name} is damaged in bytes" in text and "tensors model." in text
        assert (tensor is not None) == (rank == finder) == (not text.startswith(f"Rank {finder} found"))
        assert each["none"][0] == "CheckpointNotFoundError"
        assert each["another state"][0] == ("ResumeError" if rank == 1 else "RankFailedError")
        assert rank == 1 or "Rank 1 cannot restore" in each["another state"][1]
        assert each["again"] == 1


@pytest.mark.parametrize("saver", ["fsdp4", "fsdp2 tp2"])
def test_one_process_assembles_what_many_saved(folder: Path, saver: str) -> None:
    engine = DirectoryEngine()
    state = engine.load(path_of(folder, saver))
    expected = torch.load(folder / f"{saver}.pt")
    assert all(torch.equal(tensor, expected[f"model.{name}"]) for name, tensor in state["model"].items())
    moments = [item["exp_avg"] for item in state["optimizer"]["state"].values()]
    assert sum(m.numel() for m in moments) == sum(t.numel() for n, t in expected.items() if n.endswith(".exp_avg"))
    engine.verify(path_of(folder, saver))
    engine.close()


def test_every_blob_of_every_rank_is_verified(folder: Path, tmp_path: Path) -> None:
    engine = DirectoryEngine()
    with StoredCheckpoint(path_of(folder, "fsdp4")) as stored:
        blobs = [blob.name for blob in stored.head.blobs]
    assert len(blobs) >= 12
    for number, name in enumerate(blobs):
        damaged = tmp_path / str(number)
        shutil.copytree(path_of(folder, "fsdp4"), damaged)
        at = flip(damaged / name, "embedding" if name.startswith("model") else "")
        for use in (engine.verify, engine.load) if name.startswith("model") else (engine.verify,):
            with pytest.raises(CheckpointCorruptError, match="in the") as caught:
                use(damaged)
            low, high = caught.value.byte_range
            assert low <= at < high and str(caught.value.path).endswith(name) and caught.value.tensor
    engine.close()


def test_the_commands_show_whole_tensors_once_with_their_parts(folder: Path, capsys: Any, tmp_path: Path) -> None:
    path = str(path_of(folder, "fsdp4"))
    assert main(["show", path, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    embedding = shown["tensors"]["model.embedding.weight"]
    assert embedding["shape"] == [matrix.VOCABULARY, matrix.WIDTH] and len(embedding["parts"]) == 4
    assert embedding["parts"][1]["offsets"] == [751, 0] and embedding["parts"][1]["file"] == "model-r00001.safetensors"
    assert not any("[" in name for name in shown["tensors"])
    assert shown["values"]["own (rank 2).rank"] == "2"
    assert main(["show", path]) == 0
    assert "4 parts" in capsys.readouterr().out
    assert main(["verify", path]) == 0
    assert main(["ls", str(folder / "fsdp4")]) == 0
    capsys.readouterr()


def test_the_commands_compare_and_convert_across_layouts(folder: Path, capsys: Any, tmp_path: Path) -> None:
    source = path_of(folder, "fsdp2 tp2")
    for target in ("one", "one.ckpt", "one.safetensors"):
        assert main(["convert", str(source), str(tmp_path / target)]) == 0
    capsys.readouterr()
    assert main(["diff", str(source), str(tmp_path / "one"), "--json"]) == 1
    changes = json.loads(capsys.readouterr().out)
    assert all(change["name"].startswith("own") for change in changes)  # those that each rank had of its own
    assert main(["diff", str(path_of(folder, "single")), str(source), "--json"]) == 1
    changed = {change["name"] for change in json.loads(capsys.readouterr().out) if change["kind"] == "changed"}
    assert "model.blocks.0.up.weight" in changed
    weights = load_file(tmp_path / "one.safetensors")
    expected = torch.load(folder / "fsdp2 tp2.pt")
    assert all(torch.equal(weights[n.removeprefix("model.")], t) for n, t in expected.items() if n.startswith("model."))
    with zipfile.ZipFile(tmp_path / "one.ckpt") as archive:
        assert archive.testzip() is None
