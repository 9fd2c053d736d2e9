"""One launch of four processes, in which groups of 1 to 4 ranks save and load in every layout, one after the other."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from milepost import _distributed
from milepost.engine.reader import StoredCheckpoint
from milepost.format.layout import PIECE_BYTES, pieces_of

SAVERS = {"single": 1, "ddp2": 2, "fsdp2": 2, "fsdp4": 4, "fsdp2 tp2": 4, "hybrid": 4, "page: fsdp2 tp2": 4}
"""Layouts, and how many ranks save them; the last one by the writer that was made from the format page."""
LOADERS = {"single": 1, "ddp2": 2, "fsdp1": 1, "fsdp3": 3, "fsdp4": 4, "fsdp2 tp2": 4, "hybrid": 4}
FEW = {"hybrid", "page: fsdp2 tp2"}
PAIRS = [
    (saver, loader)
    for saver in SAVERS
    for loader in LOADERS
    if not {saver, loader} & FEW or loader == "fsdp3" or (saver, loader) == ("fsdp2 tp2", "hybrid")
]
"""All of the first five with all of the first six, and a few more."""
VOCABULARY, WIDTH = 3001, 96  # the embedding alone is more than a piece; 3001 rows divide by nothing


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.gate = nn.Parameter(torch.randn(5))  # fewer rows than some have ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        mixed = F.scaled_dot_product_attention(self.query(y), self.key(y), y, is_causal=True)
        return x + mixed * self.gate.sum() + self.down(F.gelu(self.up(y)))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 50)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Run:
    """A model in one layout, and its optimizer."""

    def __init__(self, layout: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.layout = layout
        self.model = Language()
        self.called: nn.Module = self.model
        if layout == "fsdp2 tp2":
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
            for block in self.model.blocks:
                plan: Any = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(block, mesh["tensor"], plan)
            self._shard(mesh["data"])
        elif layout == "hybrid":
            self._shard(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))
        elif layout.startswith("fsdp"):
            self._shard(init_device_mesh("cpu", (dist.get_world_size(),)))
        elif layout.startswith("ddp"):
            self.called = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def _shard(self, mesh: Any) -> None:
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def train(self) -> float:
        self.optimizer.zero_grad()
        loss = self.called(torch.arange(12).reshape(2, 6)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.model.seen += 1
        return float(loss.detach())

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def whole(self) -> dict[str, torch.Tensor]:
        """All tensors of model and optimizer, whole, by name."""
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            tensors |= {f"{name}.{key}": t for key, t in self.optimizer.state[parameter].items()}
        return {
            name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()
        }


@contextmanager
def group(folder: Path, name: str, rank: int, size: int) -> Any:
    """A process group of the first `size` of the processes, and `None` on the others; all come out of it together."""
    ours = rank < size
    if ours and name != "single":
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(folder / f"store {name}"), size), rank=rank, world_size=size
        )
    try:
        yield ours
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    outer = dist.FileStore(str(folder / "outer"), -1)
    outer.set(f"{name} {rank}", "")
    outer.wait([f"{name} {other}" for other in range(4)])


def one_process(rank: int, folder: Path, phases: list[tuple[str, int, Callable[..., None]]]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    for name, size, work in phases:
        with group(folder, name, rank, size) as ours:
            if ours:
                work(folder, name.split(": ", 1)[1])


def pieces_read(stored: StoredCheckpoint) -> Counter[tuple[int, int]]:
    """How often each piece of each blob was read."""
    return Counter((blob, piece) for blob, start, stop in stored.ranges_read for piece in pieces_of(start, stop))


def pieces_needed(stored: StoredCheckpoint, live: dict[str, torch.Tensor]) -> set[tuple[int, int]]:
    """The pieces that hold a byte of what this rank has of each tensor, found element by element.

    Args:
        live: by the name under which a tensor, or what its parts make up, is stored in its group's blobs.
    """
    found: set[tuple[int, int]] = set()
    for number, blob in enumerate(stored.head.blobs):
        index = stored.index(number)
        for row in range(len(index.names)):
            entry, box = index.entry(row), index.box(row)
            name = entry.name if box is None else index.boxes[str(row)][0]
            path = name if blob.group in ("rest.", "rank.") else f"{blob.group}.{name}"
            if path.startswith("own."):  # each rank's own; all of them where another number of ranks loads
                ours = (blob.rank, stored.head.world_size) == (_distributed.rank(), _distributed.world_size())
                if ours or stored.head.world_size != _distributed.world_size() or stored.head.world_size == 1:
                    found |= {(number, n) for n in pieces_of(entry.start, entry.stop)}
                continue
            tensor = live[path]
            if not isinstance(tensor, DTensor):
                found |= {(number, n) for n in pieces_of(entry.start, entry.stop)}
                continue
            shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            held = numpy.zeros(tuple(tensor.shape), bool)
            held[(*(slice(at, at + n) for at, n in zip(offsets, shape, strict=True)), ...)] = True
            if box is not None:
                held = held[tuple(slice(at, at + n) for at, n in zip(*box, strict=True))]
            at = entry.start + numpy.flatnonzero(held) * tensor.element_size()
            found |= {
                (number, int(n))
                for n in numpy.unique(numpy.concatenate([at, at + tensor.element_size() - 1]) // PIECE_BYTES)
            }
    return found


def by_name(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a nested state, by the names that they are stored under."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {n: t for key, item in items for n, t in by_name(item, f"{path}.{key}" if path else str(key)).items()}
