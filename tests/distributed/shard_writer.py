"""Writes sharded checkpoint directories from docs/format.md: what a rank holds of each tensor becomes a part.

It asks torch, not the engine, which box of a DTensor a rank holds, and shares no code with the engine's saves.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from milepost.engine.state import DTYPES
from milepost.format import codec, manifest
from milepost.format.boxes import Box, part_name
from milepost.format.codec import PartsRef, RanksRef, TensorRef
from milepost.format.layout import lay_out
from milepost.format.manifest import Blob, Head, Index, Stored

Leaf = tuple[str, torch.Tensor]  # the name in its group, and the tensor as it stands in the state


def boxes_of(tensor: torch.Tensor, ranks: int) -> list[tuple[int, Box]]:
    """Each part and the rank that writes it, the first that holds it. Plain ones are cut by rows."""
    if not isinstance(tensor, DTensor):
        rows = tensor.shape[0] if tensor.dim() else 0
        if ranks == 1 or rows < 2 * ranks:
            return []
        edges = [rows * n // ranks for n in range(ranks + 1)]
        return [
            (n, Box((low, *(0,) * (tensor.dim() - 1)), (high - low, *tensor.shape[1:])))
            for n, (low, high) in enumerate(pairwise(edges))
        ]
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, (tuple(offsets), tuple(shape)))
    first = {Box(*box): rank for rank, box in reversed([*enumerate(everyone)])}
    return sorted((rank, box) for box, rank in first.items() if box.volume)


def cut_out(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        return tensor._local_tensor.detach()
    return tensor[tuple(slice(at, at + n) for at, n in zip(*box, strict=True))]


def write_blob(folder: Path, name: str, group: str, rank: int, rows: list[tuple[str, torch.Tensor, Any]]) -> Blob:
    """Rows are (name, tensor, (whole name, whole shape, offsets) or None)."""
    layout = lay_out([(n, DTYPES[t.dtype], tuple(t.shape)) for n, t, _ in rows])
    by_name = {n: (t, box) for n, t, box in rows}
    data = bytearray(layout.header)
    for entry in layout.entries:
        data += bytes(by_name[entry.name][0].contiguous().reshape(-1).view(torch.uint8).numpy())
    (folder / name).write_bytes(data)
    index = Index(
        version=1, bytes=len(data), names=[e.name for e in layout.entries], dtypes=[e.dtype for e in layout.entries],
        shapes=[list(e.shape) for e in layout.entries], starts=[e.start for e in layout.entries], strides={},
        stored_as={}, digests="".join(manifest.digest(data[n : n + (1 << 20)]) for n in range(0, len(data), 1 << 20)),
        boxes={str(n): by_name[e.name][1] for n, e in enumerate(layout.entries) if by_name[e.name][1]},
    )  # fmt: skip
    encoded = manifest.encode_index(index)
    stored = store(folder, name.removesuffix(".safetensors") + ".index.json", encoded)
    return Blob(name, len(data), stored, group, rank=rank)


def store(folder: Path, name: str, data: bytes) -> Stored:
    (folder / name).write_bytes(data)
    return Stored(name, len(data), manifest.digest(data))


def write(folder: Path, state: dict[str, Any], step: int, own: list[Any], rank: int = 0, ranks: int = 1) -> None:
    """One rank's part of writing `state`, groups of nested dicts; all call it. `own` are values of each rank."""
    folder.mkdir(exist_ok=True, parents=True)
    blobs: list[Blob] = []
    placed: dict[str, dict[tuple[str, ...], Any]] = {}
    for number, (group, value) in enumerate(state.items()):
        rows: list[tuple[str, torch.Tensor, Any]] = []
        for path, tensor in leaves(value):
            name = ".".join(map(str, path))
            parts = boxes_of(tensor, ranks)
            mine = [(part_name(name, box), cut_out(tensor, box), box) for who, box in parts if who == rank]
            rows += [(label, t, (name, list(tensor.shape), list(box.offsets))) for label, t, box in mine]
            if not parts and rank == 0:
                rows.append((name, tensor, None))
            placed.setdefault(group, {})[path] = [(who, part_name(name, box)) for who, box in parts] or [(0, name)]
        blobs.append(write_blob(folder, f"{group}-r{rank:05d}.safetensors", group, rank, rows))
        del number
    tree = store(folder, f"tree-r{rank:05d}.json", codec.encode(own))
    everyone: list[Any] = [(blobs, tree)]
    if ranks > 1:
        everyone = [None] * ranks
        dist.all_gather_object(everyone, (blobs, tree))
    if rank == 0:
        listed = [blob for each, _ in everyone for blob in each]
        order = {(b.rank, b.group): n for n, b in enumerate(listed)}
        row = {n: rows_of(folder, b) for n, b in enumerate(listed)}

        def reference(group: str, path: tuple[str, ...]) -> Any:
            places = [(order[who, group], label) for who, label in placed[group][path]]
            refs = [TensorRef(blob, row[blob][label]) for blob, label in places]
            whole = len(refs) == 1 and "[" not in places[0][1]
            return refs[0] if whole else PartsRef(tuple(r.blob for r in refs), tuple(r.row for r in refs))

        tree_of_all = {group: put(value, lambda path, g=group: reference(g, path)) for group, value in state.items()}
        tree_of_all["own"] = [RanksRef(n) for n in range(len(own))]
        described = store(folder, "tree.json", codec.encode(tree_of_all))
        head = Head(
            manifest.FORMAT, 1, step, 1.7e9, {}, ranks, listed, described, [],
            [tree for _, tree in everyone] if own else __import__("msgspec").UNSET,
        )  # fmt: skip
        head, listing = manifest.encode_listing(head)
        if listing is not None:
            (folder / manifest.LISTING_NAME).write_bytes(listing)
        (folder / manifest.HEAD_NAME).write_bytes(manifest.encode_head(head))
    if ranks > 1:
        dist.barrier()


def rows_of(folder: Path, blob: Blob) -> dict[str, int]:
    import json

    return {name: n for n, name in enumerate(json.loads((folder / blob.index.name).read_bytes())["names"])}


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [(path, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in leaves(item, (*path, key))]


def put(value: Any, reference: Any, path: tuple[Any, ...] = ()) -> Any:
    if isinstance(value, torch.Tensor):
        return reference(path)
    if isinstance(value, dict):
        return {k: put(v, reference, (*path, k)) for k, v in value.items()}
    if isinstance(value, list):
        return [put(v, reference, (*path, n)) for n, v in enumerate(value)]
    return value


def total_bytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
