"""Saving and loading by several ranks through DCP, with Milepost's storage and with DCP's own, in the same run.

    python benchmarks/many_ranks.py [--ranks 2] [--rounds 5] [--layers 12] [--folder DIR] [--out figures]

The state is that of GPT-2 small with AdamW's moments, 1.5 GB in all, as DTensors sharded over the ranks. What the FSDP
strategy of Lightning does to save sharded is the row of DCP: it calls `dcp.save` with defaults. In each round every way
is measured once, in turn, the slowest rank counts, and all values have changed since the last save. Beside them stand
the limits: a warm memcpy of a rank's bytes, and a direct write of them with fallocate and fsync, by all ranks at once.
A `Checkpointer` is what a loop of one's own would use. Reads are cold. DCP syncs its files and not their directories;
it compares nothing when it reads.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from checkpoint.limits import Limits
from checkpoint.measuring import Figures, drop_cache, gpt2, size_on_disk, tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from milepost import Checkpointer
from milepost.integrations.dcp import MilepostReader, MilepostSavePlanner, MilepostStager, MilepostWriter

Rows = dict[str, list[float]]


def sharded(layers: int, ranks: int) -> dict[str, Any]:
    """The state of GPT-2 with each tensor cut along its first dimension, as `fully_shard` cuts it."""
    mesh = init_device_mesh("cpu", (ranks,))

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        if not isinstance(value, torch.Tensor) or not value.ndim:
            return value
        parts = list(value.chunk(ranks)) + [value[:0]] * ranks
        local = parts[dist.get_rank()].clone()
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=value.shape, stride=value.stride())

    torch.manual_seed(0)
    state = gpt2(layers)
    names = list(state["model"])
    optimizer = {"state": dict(zip(names, state["optimizer"]["state"].values(), strict=True)), "lr": 1e-3}
    made: dict[str, Any] = cut({"model": state["model"], "optimizer": optimizer})
    return made


def change(state: Any) -> None:
    with torch.no_grad():
        for tensor in tensors(state):
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).add_(1e-3)


class Rank:
    """One rank of the run."""

    def __init__(self, folder: Path, rounds: int, layers: int) -> None:
        self.folder, self.rounds = folder, rounds
        self.state = sharded(layers, dist.get_world_size())
        self.bytes = sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors(self.state))
        self.rows: Rows = {}
        self.limits = Limits(self.bytes // 4 * 4, folder / f"limits-{dist.get_rank()}")
        self.limits.folder.mkdir()
        self.stager = MilepostStager()
        self.stager.prepare(self.state)
        self.group = dist.new_group(backend="gloo")
        self.checkpointer = Checkpointer(folder / "checkpointer")
        self.checkpointer.prepare(self.state)
        self.step = 0

    def measure(self, name: str, work: Callable[[], Any]) -> Any:
        """Add what the slowest rank has taken."""
        gc.collect()
        dist.barrier()
        if dist.get_rank() == 0:
            os.sync()  # what removing has left to do is nobody's
        dist.barrier()
        begin = time.perf_counter()
        found = work()
        self.add(name, time.perf_counter() - begin)
        return found

    def add(self, name: str, seconds: float) -> None:
        slowest = torch.tensor(seconds)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        self.rows.setdefault(name, []).append(slowest.item())

    def path(self, name: str) -> Path:
        """A fresh place, without the checkpoint of the round before: nothing can be linked."""
        dist.barrier()
        place = self.folder / name
        if dist.get_rank() == 0:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
        dist.barrier()
        return place / "one"

    def round(self) -> None:
        dist.barrier()
        self.add("limit: memcpy", self.limits.copy())
        dist.barrier()
        self.add("limit: direct write", self.limits.write())
        self.save("dcp", lambda path: dcp.save(self.state, checkpoint_id=path))
        self.save(
            "dcp, 2 threads",
            lambda path: dcp.save(self.state, storage_writer=dcp.FileSystemWriter(path, thread_count=2)),
        )
        self.save("milepost", lambda path: dcp.save(self.state, storage_writer=MilepostWriter(path)))
        self.save(
            "milepost, its planner",
            lambda path: dcp.save(self.state, storage_writer=MilepostWriter(path), planner=MilepostSavePlanner()),
        )
        self.save("checkpointer", lambda path: self.checkpointer.save(self.step, self.state, wait=True))
        self.background("dcp", lambda path: dcp.async_save(self.state, checkpoint_id=path, process_group=self.group))
        self.background(
            "milepost",
            lambda path: dcp.async_save(
                self.state, storage_writer=MilepostWriter(path), async_stager=self.stager, process_group=self.group
            ),
        )
        self.background("checkpointer", lambda path: self.checkpointer.save(self.step, self.state))
        self.load("dcp", lambda path: dcp.load(self.state, checkpoint_id=path))
        self.load("milepost", lambda path: dcp.load(self.state, storage_reader=MilepostReader(path)))
        self.load("checkpointer", lambda path: self.checkpointer.restore(self.state))

    def save(self, name: str, save: Callable[[Path], Any]) -> None:
        change(self.state)
        self.step += 1
        path = self.path(name)
        self.measure(f"durable: {name}", lambda: save(path))

    def background(self, name: str, save: Callable[[Path], Any]) -> None:
        change(self.state)
        self.step += 1
        path = self.path(name if name == "checkpointer" else f"{name}, async")
        future = self.measure(f"blocking: {name}", lambda: save(path))
        future.result()
        dist.barrier()

    def load(self, name: str, load: Callable[[Path], Any]) -> None:
        drop_cache(self.folder / name)
        path = self.folder / name / "one"
        self.measure(f"load: {name}", lambda: load(path))


def whole(state: Any) -> Any:
    """As one rank has it that loads alone."""
    if isinstance(state, dict):
        return {key: whole(item) for key, item in state.items()}
    return torch.empty(state.shape) if isinstance(state, torch.Tensor) else state


def alone(folder: Path, rounds: int, layers: int) -> Rows:
    """Loading what several ranks have saved by one."""
    rows: Rows = {}
    torch.manual_seed(0)
    made = gpt2(layers)
    names = list(made["model"])
    optimizer = {"state": dict(zip(names, made["optimizer"]["state"].values(), strict=True)), "lr": 0.0}
    state = whole({"model": made["model"], "optimizer": optimizer})
    for _ in range(rounds):
        for name, load in (
            ("dcp", lambda: dcp.load(state, checkpoint_id=folder / "dcp" / "one")),
            ("milepost", lambda: dcp.load(state, storage_reader=MilepostReader(folder / "milepost" / "one"))),
            ("checkpointer", lambda: Checkpointer(folder / "checkpointer").restore(state)),
        ):
            drop_cache(folder / name)
            gc.collect()
            begin = time.perf_counter()
            load()
            rows.setdefault(f"load by one: {name}", []).append(time.perf_counter() - begin)
    return rows


def start(rank: int, ranks: int, folder: str, rounds: int, layers: int) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    run = Rank(Path(folder), rounds, layers)
    for number in range(rounds + 1):
        run.round()
        if number == 0:
            run.rows.clear()  # the first is to warm up
        if rank == 0:
            print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps({"rows": run.rows, "bytes": run.bytes}))
    run.checkpointer.close()
    dist.destroy_process_group()


LIMITS = {
    "blocking": ("limit: memcpy", "a warm memcpy of the rank's bytes, 2 threads"),
    "durable": ("limit: direct write", "a direct write of the rank's bytes, 2 threads, fallocate, fsync"),
}


def add_to(figures: Figures, rows: Rows) -> None:
    """Seconds of each way, and the ratios to the limit and to DCP with defaults in the same round."""
    for name, found in rows.items():
        figures.number(name, found, "s")
    for name, found in rows.items():
        kind, _, who = name.partition(": ")
        if kind in LIMITS:
            limit, described = LIMITS[kind]
            figures.row(name, paired(found, rows[limit]), described)
        if kind != "limit" and who != "dcp":
            figures.row(name, paired(found, rows[f"{kind}: dcp"]), "dcp with its own storage")


def paired(found: list[float], other: list[float]) -> list[float]:
    """The ratios of measurements of one round."""
    return [a / b for a, b in zip(found, other, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12, help="of GPT-2; the embeddings are 470 MB by themselves")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="a folder for JSON and a table")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=chosen.folder or Path.cwd(), prefix="bench-"))
    figures = Figures(f"many_ranks_{chosen.ranks}", folder, chosen.rounds)
    begin = time.perf_counter()
    try:
        mp.spawn(start, (chosen.ranks, str(folder), chosen.rounds, chosen.layers), nprocs=chosen.ranks)
        found = json.loads((folder / "rows.json").read_text())
        rows: Rows = found["rows"] | alone(folder, chosen.rounds, chosen.layers)
        sizes = {name: size_on_disk(folder / name) for name in ("dcp", "milepost", "checkpointer")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    add_to(figures, rows)
    figures.number("bytes a rank", found["bytes"] / 1e6, "MB")
    for name, size in sizes.items():
        figures.number(f"on disk: {name}", size / 1e6, "MB")
    figures.write(chosen.out, time.perf_counter() - begin)


if __name__ == "__main__":
    main()
