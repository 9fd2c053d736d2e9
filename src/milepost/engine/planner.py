"""Deciding what has to be written: blobs from leaves, and what of the last checkpoint can be used again.

A group of the state (a top-level key; all tensors that are themselves at the top) is one blob. Where only a part of it
changes from save to save, the blob of an earlier save is linked, and the changed tensors are written beside it: the
delta always holds all that differs from the base, so that a group never consists of more than two blobs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from milepost.engine.requests import BlobPlan, Leaf, unique
from milepost.errors import UnencodableValueError
from milepost.format.layout import ITEM_BYTES, TensorEntry, lay_out, pieces_of
from milepost.format.manifest import Blob, Index

MAX_LINKS = 16
"""Saves after which a blob is written afresh: links share bit rot, and stale tensors in a base take room."""
VERIFY_EVERY = 8
"""Saves after which a blob is read and verified before it is linked once more."""
_OWN_FILE_BYTES = 1 << 20
_OWN_FILES = 12  # the head of 8 kB has room for so many, and for the delta of each
_WEIGHTS = "model"
OF_RANK = "rank"
"""Stem of the files of tensors in values that are each rank's own; their group has a dot behind it."""
_DELTA_SHARE = 0.5
_SAMPLES = 32
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Earlier:
    """A blob of the last commit with its index."""

    path: str
    blob: Blob
    index: Index


def plan_groups(leaves: Sequence[Leaf]) -> list[BlobPlan]:
    """The blobs of a state: the weights and each other large group in a file of its own, the small ones in one."""
    return [plan_blob(name, group, members) for name, group, members in files_of(leaves)]


def files_of(leaves: Sequence[Leaf]) -> list[tuple[str, str, list[Leaf]]]:
    """Which leaves share a file: its name, its group, and the leaves, named as they are in it."""
    groups: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        groups.setdefault(leaf.group, []).append(leaf)
    own = _own_files(groups)
    names: set[str] = set()
    rest = [
        replace(leaf, name=unique(f"{group}.{leaf.name}", names))
        for group, members in groups.items()
        if group not in own
        for leaf in members
    ]
    taken: set[str] = {"tree", "rest", OF_RANK}
    files = [(_file_name(group or _WEIGHTS, taken), group, groups[group]) for group in own]
    return [*files, ("rest.safetensors", "rest.", rest)] if rest else files


def _own_files(groups: dict[str, list[Leaf]]) -> list[str]:
    """Groups with a file of their own. The first holds the weights by custom, and other tools want to open it."""
    sizes = {group: sum(leaf_bytes(leaf) for leaf in members) for group, members in groups.items()}
    large = sorted((g for g in groups if sizes[g] >= _OWN_FILE_BYTES), key=lambda g: -sizes[g])[:_OWN_FILES]
    first = next((g for g in groups if g in ("", "model", "state_dict")), None)
    return [g for g in groups if g in large or g == first]


def leaf_bytes(leaf: Leaf) -> int:
    """Bytes of a leaf."""
    return ITEM_BYTES[leaf.dtype] * math.prod(leaf.shape)


def plan_blob(name: str, group: str, leaves: Sequence[Leaf], metadata: Mapping[str, str] | None = None) -> BlobPlan:
    """The plan of one blob. `metadata` goes into its header."""
    layout = lay_out([(leaf.name, leaf.dtype, leaf.shape) for leaf in leaves], metadata)
    by_name = {leaf.name: leaf for leaf in leaves}
    if len(by_name) != len(leaves):
        twice = sorted({name for name, count in Counter(leaf.name for leaf in leaves).items() if count > 1})
        raise UnencodableValueError(
            f"Several tensors of {name} have the name {twice[0]!r}. Rename the keys that it is made of.",
            key_path=twice[0],
        )
    return BlobPlan(name, group, layout, tuple(by_name[entry.name] for entry in layout.entries))


def part_of_plan(plan: BlobPlan, name: str, rows: Sequence[int]) -> BlobPlan:
    """The plan of a blob of some of the tensors of `plan`."""
    part = plan_blob(name, plan.group, [plan.leaves[row] for row in rows])
    return part.bound({plan.leaves[row].number: plan.tensors[row] for row in rows})


def index_of(plan: BlobPlan, digests: str) -> Index:
    """The index of a blob whose pieces have these digests."""
    entries = plan.layout.entries
    strides, stored_as, boxes = _exceptions(plan)
    return Index(
        version=1,
        bytes=plan.layout.size,
        names=[entry.name for entry in entries],
        dtypes=[entry.dtype for entry in entries],
        shapes=[list(entry.shape) for entry in entries],
        starts=[entry.start for entry in entries],
        strides=strides,
        stored_as=stored_as,
        digests=digests,
        boxes=boxes,
    )


_Boxes = dict[str, tuple[str, list[int], list[int]]]


def _exceptions(plan: BlobPlan) -> tuple[dict[str, list[int]], dict[str, tuple[str, list[int]]], _Boxes]:
    """By row, what few tensors have: strides of their own, a type that the format has not; and boxes."""
    strides, stored_as, boxes = {}, {}, {}
    for row, leaf in enumerate(plan.leaves):
        if leaf.stride is not None:
            strides[str(row)] = list(leaf.stride)
        if leaf.stored_as is not None:
            stored_as[str(row)] = (leaf.stored_as[0], list(leaf.stored_as[1]))
        if leaf.part_of is not None:
            name, shape, offsets = leaf.part_of
            boxes[str(row)] = (name, list(shape), list(offsets))
    return strides, stored_as, boxes


def same_structure(plan: BlobPlan, index: Index) -> bool:
    """Whether the blob of `index` has the very layout of `plan`, so that equal bytes mean equal tensors."""
    entries = plan.layout.entries
    if plan.layout.size != index.bytes or len(entries) != len(index.names):
        return False
    columns = zip(entries, index.names, index.dtypes, index.shapes, index.starts, strict=True)
    return _exceptions(plan) == (index.strides, index.stored_as, index.boxes) and all(
        entry.name == name and entry.start == start and entry.dtype == dtype and list(entry.shape) == shape
        for entry, name, dtype, shape, start in columns
    )


def samples(begin: int, size: int) -> list[tuple[int, int]]:
    """A few ranges of a blob whose tensors begin at `begin`, spread evenly: the share of them that differs is about the
    share of bytes that does."""
    each = max(-(-(size - begin) // _SAMPLES), 1)
    return [(start, min(start + _SAMPLE_BYTES, size)) for start in range(begin + each // 2, size, each)] or [(0, size)]


def changed_pieces(index: Index, digests: str) -> list[int]:
    return [n for n in range(len(digests) // 32) if digests[32 * n : 32 * n + 32] != index.digest(n)]


def changed_entries(
    entries: Sequence[TensorEntry], pieces: Sequence[int], piece_bytes: int, equal: Callable[[int, int], bool]
) -> list[int]:
    """Rows of the tensors that differ, from the pieces that do.

    Args:
        equal: whether the bytes of a range are the same as those stored; asked only for the ends of tensors that share
            a changed piece with their neighbours.
    """
    changed = set(pieces)
    rows = []
    for row, entry in enumerate(entries):
        touched = [n for n in pieces_of(entry.start, entry.stop) if n in changed]
        if not touched:
            continue
        inside = any(n * piece_bytes >= entry.start and (n + 1) * piece_bytes <= entry.stop for n in touched)
        spans = ((max(entry.start, n * piece_bytes), min(entry.stop, (n + 1) * piece_bytes)) for n in touched)
        if inside or not all(equal(start, stop) for start, stop in spans):
            rows.append(row)
    return rows


def worth_a_delta(plan: BlobPlan, rows: Sequence[int]) -> bool:
    """Whether so little has changed that writing it beside the base is better than writing all of it."""
    return sum(plan.layout.entries[row].size for row in rows) <= _DELTA_SHARE * plan.layout.size


def delta_names(plan: BlobPlan) -> tuple[str, str]:
    """Names of base and delta, as tools that read sharded safetensors files expect them."""
    stem = plan.name.removesuffix(".safetensors")
    return f"{stem}-00001-of-00002.safetensors", f"{stem}-00002-of-00002.safetensors"


def _file_name(group: str, taken: set[str]) -> str:
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", group)[:100].lstrip(".") or "state"
    unique, number = stem, 2
    while unique in taken:
        unique, number = f"{stem}-{number}", number + 1
    taken.add(unique)
    return f"{unique}.safetensors"
