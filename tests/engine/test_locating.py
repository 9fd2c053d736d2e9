"""Of the indexes of many ranks a rank reads those that it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from milepost.engine.directory import DirectoryEngine
from milepost.engine.locating import Located
from milepost.engine.reader import StoredCheckpoint
from milepost.errors import CheckpointFormatError
from milepost.format import codec, manifest
from milepost.format.boxes import Box, part_name
from milepost.format.codec import PartsRef
from milepost.format.layout import lay_out
from milepost.format.manifest import Blob, Head, Index, Stored

RANKS, ROWS = 32, 100
WHOLE = torch.arange(RANKS * ROWS * 8, dtype=torch.float32).reshape(RANKS * ROWS, 8)
REF = PartsRef(tuple(range(RANKS)), (0,) * RANKS)


def stored_as(folder: Path, name: str, data: bytes) -> Stored:
    (folder / name).write_bytes(data)
    return Stored(name, len(data), manifest.digest(data))


def blob_of(folder: Path, rank: int, first: int) -> Blob:
    """The rows from `first` on, as rank `rank` would write them."""
    box, name = Box((first, 0), (ROWS, 8)), f"model-r{rank:05d}"
    layout = lay_out([(part_name("w", box), "F32", box.shape)])
    data = layout.header + WHOLE[first : first + ROWS].numpy().tobytes()
    (folder / f"{name}.safetensors").write_bytes(data)
    index = Index(
        version=1, bytes=len(data), names=[layout.entries[0].name], dtypes=["F32"], shapes=[list(box.shape)],
        starts=[layout.entries[0].start], strides={}, stored_as={}, digests=manifest.digest(data),
        boxes={"0": ("w", list(WHOLE.shape), [first, 0])},
    )  # fmt: skip
    stored = stored_as(folder, f"{name}.index.json", manifest.encode_index(index))
    return Blob(f"{name}.safetensors", len(data), stored, "model", rank=rank)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, [blob_of(tmp_path, rank, rank * ROWS) for rank in range(RANKS)])
    return tmp_path


def write(folder: Path, blobs: list[Blob]) -> None:
    tree = stored_as(folder, "tree.json", codec.encode({"model": {"w": REF}}))
    head, listing = manifest.encode_listing(Head(manifest.FORMAT, 1, 3, 1.7e9, {}, RANKS, blobs, tree))
    if listing is not None:
        (folder / manifest.LISTING_NAME).write_bytes(listing)
    (folder / manifest.HEAD_NAME).write_bytes(manifest.encode_head(head))


@pytest.mark.parametrize("rank", [0, 7, RANKS - 1])
def test_what_a_rank_saved_it_finds_in_its_own_index(folder: Path, rank: int) -> None:
    with StoredCheckpoint(folder) as stored:
        located = Located(stored, rank)
        assert located.type_of(REF) == (torch.float32, (RANKS * ROWS, 8))
        parts = located.parts(REF, [Box((rank * ROWS, 0), (ROWS, 8))])
        assert [place.blob for place, _ in parts] == [rank] and set(stored._indexes) == {rank}


def test_another_number_of_ranks_reads_about_the_indexes_that_hold_its_part(folder: Path) -> None:
    for rank in range(4):
        with StoredCheckpoint(folder) as stored:
            rows = RANKS * ROWS // 4
            parts = Located(stored, rank).parts(REF, [Box((rank * rows, 0), (rows, 8))])
            assert sorted(place.blob for place, _ in parts) == list(range(8 * rank, 8 * rank + 8))
            assert len(stored._indexes) <= 2 * 8 + 1


def test_a_gap_or_an_overlap_is_found_by_whoever_needs_that_part(tmp_path: Path) -> None:
    blobs = [blob_of(tmp_path, rank, rank * ROWS) for rank in range(RANKS)]
    blobs[5] = blob_of(tmp_path, 5, 6 * ROWS)
    write(tmp_path, blobs)
    engine = DirectoryEngine()
    with StoredCheckpoint(tmp_path) as stored:
        located = Located(stored, 9)
        assert len(located.parts(REF, [Box((9 * ROWS, 0), (ROWS, 8))])) == 1
        with pytest.raises(CheckpointFormatError, match="'w' do not fill it"):
            located.parts(REF, [Box((5 * ROWS, 0), (ROWS, 8))])
    with pytest.raises(CheckpointFormatError, match="do not fill"):
        engine.load(tmp_path)
    engine.close()


def test_parts_of_two_tensors_are_not_one(folder: Path) -> None:
    with StoredCheckpoint(folder) as stored:
        index = json.loads((folder / "model-r00005.index.json").read_bytes())
        blobs: list[Any] = list(stored.head.blobs)
    index["boxes"]["0"][0], index["names"][0] = "v", index["names"][0].replace("w", "v")
    described = stored_as(folder, "model-r00005.index.json", json.dumps(index, separators=(",", ":")).encode())
    blobs[5] = msgspec.structs.replace(blobs[5], index=described)
    write(folder, blobs)
    with StoredCheckpoint(folder) as stored, pytest.raises(CheckpointFormatError, match="for one tensor"):
        Located(stored, 4).parts(REF, [Box((4 * ROWS, 0), (2 * ROWS, 8))])
