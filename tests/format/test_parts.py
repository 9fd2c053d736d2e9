"""Tensors in parts: what the index and the tree say of them is taken only where it fits together, and stays compact."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.errors import CheckpointFormatError
from milepost.format import boxes, codec, manifest
from milepost.format.boxes import Box
from milepost.format.codec import PartsRef, RanksRef, TensorRef
from milepost.format.manifest import Blob, Head, Index, Stored
from milepost.format.parts import parted


def cut(box: Box, draw: random.Random, times: int) -> list[Box]:
    """The box in parts, cut at random."""
    found = [box]
    for _ in range(times):
        victim = found.pop(draw.randrange(len(found)))
        dimension = draw.randrange(len(box.shape))
        size = victim.shape[dimension]
        at = draw.randrange(1, size) if size > 1 else size
        for first, length in ((0, at), (at, size - at)):
            if length:
                offsets, shape = list(victim.offsets), list(victim.shape)
                offsets[dimension] += first
                shape[dimension] = length
                found.append(Box(tuple(offsets), tuple(shape)))
    draw.shuffle(found)
    return found


@settings(max_examples=150, deadline=None, database=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 12), st.randoms(use_true_random=False))
def test_every_tiling_is_taken_and_every_other_is_not(shape: list[int], times: int, draw: random.Random) -> None:
    tiling = cut(Box((0,) * len(shape), tuple(shape)), draw, times)
    assert boxes.fault(shape, tiling) is None
    assert boxes.fault(shape, tiling[1:]) is not None
    assert boxes.fault(shape, [*tiling, tiling[0]]) == "two overlap"
    if len(tiling) > 1 and tiling[0] != tiling[1]:
        assert boxes.fault(shape, [tiling[0], *tiling[2:], tiling[0]]) is not None


def test_a_knot_that_no_straight_cut_separates() -> None:
    """Four bars around a square in the middle: a tiling; moved by one, they overlap."""
    wheel = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    knot = [Box(*each) for each in wheel]
    assert boxes.fault((3, 3), knot) is None
    moved = [*knot[:-1], Box((0, 1), (1, 1))]
    assert boxes.fault((3, 3), moved) == "two overlap"


def test_many_boxes_are_checked_in_little_time() -> None:
    """Pair by pair this would be 2 * 10**9 comparisons."""
    grid = [Box((4 * row, 4 * column), (4, 4)) for row in range(256) for column in range(256)]
    assert boxes.fault((1024, 1024), grid) is None
    stairs = [Box((n, 0), (1, 65_536 - n)) for n in range(65_536)]
    assert boxes.fault((65_536, 65_536), stairs) is not None


def index_of(rows: list[tuple[str, list[int], list[int], list[int]]], **change: Any) -> dict[str, Any]:
    """An index of parts, given as (name, shape, offsets, shape of the whole)."""
    starts, at = [], 8
    for _, shape, _, _ in rows:
        starts.append(at)
        at += 4 * shape[0] * shape[1]
    fields: dict[str, Any] = {
        "version": 1, "bytes": at, "digests": "0" * 32,
        "names": [boxes.part_name(n, Box(tuple(o), tuple(s))) for n, s, o, _ in rows],
        "dtypes": ["F32"] * len(rows), "shapes": [s for _, s, _, _ in rows], "starts": starts,
        "strides": {}, "stored_as": {}, "boxes": {str(k): (n, w, o) for k, (n, _, o, w) in enumerate(rows)},
    }  # fmt: skip
    return {**fields, **change}


def decoded(fields: dict[str, Any]) -> Index:
    data = msgspec.json.encode(fields)
    stored = Stored("x.index.json", len(data), manifest.digest(data))
    return manifest.decode_index(data, stored, Blob("x", fields["bytes"], stored, "x"), "x.index.json")


HALVES = [("w", [2, 4], [0, 0], [4, 4]), ("w", [2, 4], [2, 0], [4, 4])]


def test_an_index_with_boxes_is_read_and_one_without_has_no_word_of_them() -> None:
    index = decoded(index_of(HALVES))
    assert index.box(1) == Box((2, 0), (2, 4)) and index.names[1] == "w[2:4,0:4]"
    assert b"boxes" not in manifest.encode_index(msgspec.structs.replace(index, boxes={}))
    assert decoded(json.loads(manifest.encode_index(index))) == index


@pytest.mark.parametrize(
    "change",
    [
        {"boxes": {"0": ("w", [1, 4], [0, 0])}},  # longer than the whole
        {"boxes": {"0": ("w", [4, 4], [3, 0])}},  # begins too late
        {"boxes": {"0": ("w", [4, 4], [-1, 0])}},
        {"boxes": {"0": ("w", [4], [0])}},  # another number of dimensions
        {"boxes": {"0": ("w", [4, 4], [0])}},
        {"boxes": {"0": ("v", [4, 4], [0, 0])}},  # its row has another name
        {"boxes": {"0": ("w", [2**61, 2**61], [0, 0])}},
        {"boxes": {"2": ("w", [4, 4], [0, 0])}},
        {"boxes": {"00": ("w", [4, 4], [0, 0])}},
        {"names": ["w", "w[2:4,0:4]"]},
        {"strides": {"0": [1, 2]}},
        {"stored_as": {"0": ("torch.complex128", [2, 4])}},
        {"shapes": [[0, 4], [2, 4]], "starts": [8, 8]},
    ],
    ids=str,
)
def test_a_box_that_is_none_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointFormatError):
        decoded(index_of(HALVES, **change))


def test_parts_are_put_together_and_what_is_not_one_tensor_is_refused() -> None:
    def put_together(*refs: tuple[int, int], rows: Any = HALVES, **change: Any) -> Any:
        indexes = [decoded(index_of(rows)), decoded(index_of([rows[1], rows[0]], **change))]
        return parted(PartsRef(*zip(*refs, strict=True)), indexes.__getitem__, "c")

    found = put_together((0, 0), (1, 0))
    assert (found.name, found.dtype, found.shape) == ("w", "F32", (4, 4))
    assert [box.offsets for _, box in found.parts] == [(0, 0), (2, 0)]
    with pytest.raises(CheckpointFormatError, match="leave 8 of 16"):
        put_together((0, 0))
    with pytest.raises(CheckpointFormatError, match="overlap"):
        put_together((0, 0), (1, 1))
    with pytest.raises(CheckpointFormatError, match="overlap"):
        put_together((0, 0), (0, 1), (1, 0))
    with pytest.raises(CheckpointFormatError, match="row 2 of blob 1"):
        put_together((0, 0), (1, 2))
    with pytest.raises(CheckpointFormatError, match=r"parts of .* and "):
        put_together((0, 0), (1, 0), dtypes=["I32", "F32"])
    with pytest.raises(CheckpointFormatError, match=r"parts of .* and "):
        put_together((0, 0), (0, 1), rows=[HALVES[0], ("v", [2, 4], [2, 0], [4, 4])])
    with pytest.raises(CheckpointFormatError, match="for a part"):
        put_together((0, 0), (1, 0), boxes={})


def test_references_to_parts_come_back_and_take_little_room() -> None:
    everywhere = tuple(range(1024))
    state = {
        "model": OrderedDict((f"layers.{n}.weight", PartsRef(everywhere, (n,) * 1024)) for n in range(500)),
        "mixed": {"a": TensorRef(3, 1), "b": PartsRef((0, 2), (7, 4)), "c": TensorRef(3, 2)},
        "alone": [PartsRef((0, 1), (2, 3)), RanksRef(0)],
    }
    data = codec.encode(state)
    assert codec.decode(data, "tree.json") == state
    assert type(codec.decode(data, "tree.json")["model"]) is OrderedDict
    assert len(data) < 1024 * 5 + 500 * 30, "the ranks are listed once, not for each tensor"


@pytest.mark.parametrize(
    "tag",
    [
        ["parts", [[], []]], ["parts", [[0, 1], [0]]], ["parts", [0, 0]], ["parts", [[0, -1], 0]],
        ["parts", [[0, 0], 3]], ["parts", [[0, 1], [0, True]]], ["parts", [[0, 1]]], ["ranks", -1], ["ranks", "0"],
        ["ranks", None], ["parted", ["dict", ["a"], [[0, 1]], [1], [0]]], 
        ["parted", ["dict", ["a"], [[0, 1]], [-1], [0]]],
        ["parted", ["dict", ["a", "a"], [[0, 1]], [0, 0], [0, 1]]], ["parted", ["list", ["a"], [[0, 1]], [0], [0]]],
        ["parted", ["dict", ["a"], [[0, 1]], [0], [[0]]]], ["parted", ["dict", ["a", "b"], [[0, 1]], [0], [0]]],
        ["parted", ["dict", ["a"], [[]], [0], [0]]], ["parted", ["dict", ["a"], [0], [0], [[1]]]],
    ],
    ids=str,
)  # fmt: skip
def test_references_that_are_none_are_refused(tag: list[Any]) -> None:
    with pytest.raises(CheckpointFormatError):
        codec.decode(json.dumps({"x": {"$": tag[0], "v": tag[1]}}).encode(), "tree.json")


def head_of(ranks: int, **change: Any) -> Head:
    def stored(name: str) -> Stored:
        return Stored(name, 5, "0" * 32)

    blobs = [
        Blob(f"model-r{n:05}.safetensors", 9, stored(f"model-r{n:05}.index.json"), "model", rank=n)
        for n in range(ranks)
    ]
    trees = [stored(f"tree-r{n:05}.json") for n in range(ranks)]
    fields: dict[str, Any] = {"metrics": {}, "world_size": ranks, "blobs": blobs, "trees": trees, **change}
    return Head(manifest.FORMAT, 1, 3, 1e9, tree=stored("tree.json"), **fields)


@pytest.mark.parametrize("ranks", [2, 400])
def test_a_head_of_any_number_of_ranks(ranks: int) -> None:
    head = head_of(ranks)
    small, listing = manifest.encode_listing(head)
    assert (listing is None) == (ranks == 2)
    back = manifest.decode_head(manifest.encode_head(small), "c")
    if listing is not None:
        assert back.blobs == [] and back.trees is msgspec.UNSET
        back = manifest.decode_listing(listing, back, "c")
    assert (back.blobs, back.trees, back.tree) == (head.blobs, head.trees, head.tree)
    assert len(back.files()) == 3 * ranks + 2 + (listing is not None) and len(set(back.files())) == len(back.files())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trees": [Stored("tree-r00000.json", 5, "")]}, "1 trees of 2 ranks"),
        ({"world_size": 1}, "of rank 1 of 1"),
        ({"trees": [Stored("tree.json", 5, ""), Stored("t", 5, "")]}, "twice"),
        ({"trees": [Stored("../t", 5, ""), Stored("t", 5, "")]}, "plain name"),
        ({"trees": [Stored("u", -5, ""), Stored("t", 5, "")]}, "negative"),
        ({"listing": Stored("blobs.json", 5, "")}, "itself and in"),
    ],
)
def test_a_head_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointFormatError, match=message):
        manifest.decode_head(manifest.encode_head(head_of(2, **change)), "c")


def test_a_listing_is_checked_as_the_head_is() -> None:
    small, listing = manifest.encode_listing(head_of(400))
    assert listing is not None
    for before, after, message in (
        (b'"rank":7}', b'"rank":400}', "of rank 400"),
        (b"tree-r00001", b"tree-r00002", "twice"),
    ):
        forged = listing.replace(before, after)
        assert forged != listing
        named = msgspec.structs.replace(small, listing=Stored("blobs.json", len(forged), manifest.digest(forged)))
        with pytest.raises(CheckpointFormatError, match=message):
            manifest.decode_listing(forged, named, "c")
