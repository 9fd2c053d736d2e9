"""Boxes of stored tensors, read straight into memory of any strides; pieces once, and only those that are needed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from milepost.engine.directory import DirectoryEngine
from milepost.engine.reader import StoredCheckpoint
from milepost.engine.requests import Destination
from milepost.engine.writer import Workers
from milepost.errors import CheckpointCorruptError
from milepost.format.layout import PIECE_BYTES
from milepost.format.regions import region

SHAPES = {"rows": (3000, 700), "columns": (700, 3000), "cube": (40, 50, 300), "wide": (5, 700_001), "one": (1,)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("saved") / "c"
    state = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    state["half"] = torch.randn(301, 4001).to(torch.bfloat16)
    engine = DirectoryEngine()
    engine.save(path, state, background=False)
    engine.close()
    return path, state


@pytest.fixture
def workers() -> Any:
    made = Workers(2)
    yield made
    made.close()


def destination(stored: StoredCheckpoint, name: str, live: torch.Tensor, offsets: tuple[int, ...]) -> Destination:
    index = stored.index(0)
    entry = index.entry(index.names.index(name))
    strides = tuple(live.itemsize * n for n in live.stride())
    found = region(entry.shape, offsets, tuple(live.shape), live.itemsize, strides)
    return Destination(entry.start + found.start, entry.start + found.stop, live.data_ptr(), found.run, found.steps)


BOXES = {
    "whole rows": ("rows", (100, 0), (900, 700)),
    "columns": ("columns", (0, 1000), (700, 1000)),
    "one column": ("columns", (0, 7), (700, 1)),
    "a box in the middle": ("cube", (3, 5, 7), (20, 30, 100)),
    "rows that are longer than pieces": ("wide", (1, 3), (4, 600_000)),
    "half numbers at odd places": ("half", (3, 17), (290, 1001)),
    "one number": ("one", (0,), (1,)),
}


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("memory", ["contiguous", "in a larger one", "transposed"])
def test_a_box_comes_into_memory_of_any_strides(saved: Any, workers: Workers, name: str, memory: str) -> None:
    path, state = saved
    tensor, offsets, sizes = BOXES[name]
    dtype = state[tensor].dtype
    around = torch.zeros([n + 2 for n in sizes], dtype=dtype)
    live = torch.zeros(sizes, dtype=dtype)
    if memory == "in a larger one":
        live = around[tuple(slice(1, n + 1) for n in sizes)]
    elif memory == "transposed":
        live = torch.zeros(sizes[::-1], dtype=dtype).permute(*range(len(sizes))[::-1])
    with StoredCheckpoint(path) as stored:
        stored.read({0: [destination(stored, tensor, live, offsets)]}, workers)
    expected = state[tensor][tuple(slice(low, low + n) for low, n in zip(offsets, sizes, strict=True))]
    assert torch.equal(live, expected)
    around[tuple(slice(1, n + 1) for n in sizes)] = 0
    assert not around.any()


def test_many_boxes_of_one_blob_read_each_piece_once(saved: Any, workers: Workers) -> None:
    path, state = saved
    lives = [torch.zeros(700, 1500), torch.zeros(700, 1500), torch.zeros(3000, 700), torch.zeros(40, 50, 150)]
    with StoredCheckpoint(path) as stored:
        wanted = [
            destination(stored, "columns", lives[0], (0, 0)),
            destination(stored, "columns", lives[1], (0, 1500)),
            destination(stored, "rows", lives[2], (0, 0)),
            destination(stored, "cube", lives[3], (0, 0, 150)),
        ]
        stored.read({0: wanted}, workers)
        pieces = Counter(
            n for _, start, stop in stored.ranges_read for n in range(start // PIECE_BYTES, -(-stop // PIECE_BYTES))
        )
    assert set(pieces.values()) == {1}
    assert torch.equal(torch.cat(lives[:2], 1), state["columns"])
    assert torch.equal(lives[2], state["rows"]) and torch.equal(lives[3], state["cube"][:, :, 150:])


def test_pieces_between_rows_are_left_out(saved: Any, workers: Workers) -> None:
    path, state = saved
    live = torch.zeros(5, 10)
    with StoredCheckpoint(path) as stored:
        wanted = destination(stored, "wide", live, (0, 500_000))
        stored.read({0: [wanted]}, workers)
        read = sum(stop - start for _, start, stop in stored.ranges_read)
    assert torch.equal(live, state["wide"][:, 500_000:500_010])
    assert read <= 5 * PIECE_BYTES < wanted.stop - wanted.start


def test_damage_is_found_by_whoever_needs_the_piece_and_by_nobody_else(
    saved: Any, workers: Workers, tmp_path: Path
) -> None:
    import shutil

    path, state = saved
    damaged = tmp_path / "c"
    shutil.copytree(path, damaged)
    with StoredCheckpoint(damaged) as stored:
        index = stored.index(0)
        entry = index.entry(index.names.index("columns"))
        blob = damaged / stored.head.blobs[0].name
    at = entry.start + entry.size // 2
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 4]))
    with StoredCheckpoint(damaged) as stored:
        live = torch.zeros(700, 10)
        with pytest.raises(CheckpointCorruptError, match="columns") as caught:
            stored.read({0: [destination(stored, "columns", live, (0, 5))]}, workers)
        low, high = caught.value.byte_range
        assert low <= at < high and caught.value.tensor == "columns"
        live = torch.zeros(10, 3000)
        stored.read({0: [destination(stored, "columns", live, (0, 0))]}, workers)
        assert torch.equal(live, state["columns"][:10])
