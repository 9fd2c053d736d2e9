"""What one rank writes of a save through DCP: its blobs and indexes, in a pending directory of its own.

Ranks of DCP meet only in DCP's own collectives, and with cached plans none hears of another before the end. So each
rank writes beside the target; the coordinator moves the files into its own directory, and commits that.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from msgspec import UNSET, structs
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from milepost._distributed import PerRank
from milepost.engine.commit import PendingDirectory
from milepost.engine.planner import Earlier, files_of, plan_blob
from milepost.engine.rank_blobs import file_name
from milepost.engine.reader import StoredCheckpoint
from milepost.engine.requests import BlobPlan, Leaf
from milepost.engine.save import Committed, Saving, maps_of
from milepost.engine.staging import LiveImage, Source
from milepost.engine.state import Flattened
from milepost.engine.value_forms import encode as form_of
from milepost.engine.writer import Workers
from milepost.errors import CheckpointError, UnencodableValueError
from milepost.format import codec, manifest
from milepost.format.boxes import Box, part_name
from milepost.format.codec import Tagged, TensorRef
from milepost.format.manifest import HEAD_NAME, Blob
from milepost.integrations.dcp.nesting import KeyPath
from milepost.integrations.dcp.sources import is_container
from milepost.storage.store import Store

Pickled = Callable[[str, Any], None]


@dataclass(frozen=True)
class Stored:
    """Where a rank has stored an item: DCP carries it to the coordinator.

    Attributes:
        ref: of a tensor; its blob counts among the rank's own.
        tree: of a value, as the codec has it. Neither: nothing is stored for the item itself.
    """

    ref: TensorRef | None = None
    tree: bytes | None = None


@dataclass(frozen=True)
class RankFiles:
    """All that a rank has written.

    Attributes:
        directory: where the files are.
        maps: where one rank saves alone, what other tools read of groups that lie in two files: names and contents.
        own: keys of the `PerRank` values, in their order in the file `tree`.
    """

    directory: str
    blobs: tuple[Blob, ...]
    maps: tuple[tuple[str, bytes], ...] = ()
    own: tuple[str, ...] = ()
    tree: manifest.Stored | None = None

    def names(self) -> list[tuple[str, int]]:
        """All files, with their sizes in bytes."""
        found = [(part.name, part.bytes) for blob in self.blobs for part in (blob, blob.index)]
        return found if self.tree is None else [*found, (self.tree.name, self.tree.bytes)]


@dataclass(frozen=True)
class _Item:
    """An item of DCP's plan, and where it stands in the state of this rank.

    Attributes:
        part_of: where it is a part of a tensor, the shape of that and which box of it this is.
        empty: whether it is a part without elements, which is not stored.
        closed: whether it is the form of a container that DCP has taken for one value.
    """

    write: WriteItem | None
    group: str
    name: str
    value: Any
    part_of: tuple[tuple[int, ...], Box] | None = None
    empty: bool = False
    closed: bool = False


def write_rank(
    plan: SavePlan, planner: SavePlanner, pending: PendingDirectory, store: Store, workers: Workers,
    rank: int, ranks: int, last: Committed | None, pickled: Pickled | None,
) -> tuple[list[tuple[WriteItem, Stored]], RankFiles]:  # fmt: skip
    """Write the items of a rank's plan; all is durable when this returns.

    Raises:
        UnencodableValueError: a value cannot be stored as data, and `pickled` is None.
        OSError: writing failed.
    """
    own = _own(planner, plan) if ranks > 1 else {}
    items = [_resolved(item, planner, _path(item.index.fqn, plan)) for item in plan.items if item.index.fqn not in own]
    flattened = _flattened([*own.values(), *items], pickled, len(own))
    plans = _plans(flattened, items, rank, ranks)
    saving = Saving(store, workers, plans, [LiveImage(Source(each)) for each in plans], last)
    blobs = [written.earlier for written in saving.blobs(pending, rank)]
    places = saving.places(blobs)
    tree = flattened.tree(places.__getitem__)
    found = [(item.write, _stored(item, tree)) for item in items if item.write is not None]
    if ranks == 1:
        alone = tuple(structs.replace(each.blob, rank=UNSET) for each in blobs)
        return found, RankFiles(pending.path, alone, tuple(maps_of(blobs)))
    stored = None
    if own:
        data = codec.encode(flattened.own_tree(places.__getitem__))
        stored = saving.small(pending, file_name(manifest.TREE_NAME, rank), data, None)
    return found, RankFiles(pending.path, tuple(each.blob for each in blobs), own=tuple(own), tree=stored)


def base_of(target: str, rank: int, ranks: int) -> Committed | None:
    """The checkpoint that a save to `target` may link files of: the one it replaces, or the newest beside it."""
    with suppress(CheckpointError, OSError):
        path = target if _saved_at(target) else max(_siblings(target), default=(0, ""))[1]
        if not path:
            return None
        with StoredCheckpoint(path) as stored:
            own = [n for n, blob in enumerate(stored.head.blobs) if (0 if blob.rank is UNSET else blob.rank) == rank]
            if stored.head.world_size != ranks:
                return None
            blobs = [Earlier(f"{path}/{stored.head.blobs[n].name}", stored.head.blobs[n], stored.index(n)) for n in own]
            return Committed(path, stored.head, tuple(blobs), stored.identities())
    return None


def _siblings(target: str) -> list[tuple[int, str]]:
    """Checkpoints beside the target, with the time when each was written."""
    parent = os.path.dirname(target)  # noqa: PTH120
    with os.scandir(parent) as entries:
        paths = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False) and entry.name[0] != "."]
    return [(time, path) for path in paths if (time := _saved_at(path))]


def _saved_at(path: str) -> int:
    try:
        return os.stat(f"{path}/{HEAD_NAME}").st_mtime_ns  # noqa: PTH116
    except OSError:
        return 0


# ---- items -----------------------------------------------------------------------------------------------------------


def _path(key: str, plan: SavePlan) -> KeyPath:
    paths: Any = plan.planner_data
    return paths.get(key, (key,)) if isinstance(paths, Mapping) else (key,)


def _named(path: KeyPath) -> tuple[str, str]:
    """Group and name of what stands at a path."""
    return (str(path[0]) if len(path) > 1 else ""), ".".join(map(str, path[1:])) or str(path[0])


def _own(planner: SavePlanner, plan: SavePlan) -> dict[str, _Item]:
    """The `PerRank` values of the state, in an order that is the same on all ranks. DCP's plans know one of each."""
    state = getattr(planner, "state_dict", {})
    paths = {key: _path(key, plan) for key, value in state.items() if isinstance(value, PerRank)}
    return {key: _Item(None, *_named(path), state[key]) for key, path in sorted(paths.items(), key=_in_order)}


def _in_order(item: tuple[str, KeyPath]) -> list[str]:
    return list(map(str, item[1]))


def _flattened(items: list[_Item], pickled: Pickled | None, own: int) -> Flattened:
    state: dict[str, Any] = {}
    for item in items:
        if not item.empty:
            (state.setdefault(item.group, {}) if item.group else state)[item.name] = item.value
    found = Flattened(state, pickled, ranks=own > 0)
    if len(found.own_paths) != own or found.sharded:
        raise UnencodableValueError(
            "There is a PerRank value or a DTensor within a value that DCP stores as one, such as a tuple or a list of"
            " numbers: give it a key of its own."
        )
    return found


def _resolved(item: WriteItem, planner: SavePlanner, path: KeyPath) -> _Item:
    group, name = _named(path)
    if item.type == WriteItemType.BYTE_IO:
        value = _value(item, planner)
        if is_container(value):
            return _Item(item, group, name, _closed(value, item.index.fqn), closed=True)
        return _Item(item, group, name, value)
    assert item.tensor_data is not None
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, torch.Tensor)
    whole, chunk = tuple(item.tensor_data.size), item.tensor_data.chunk
    box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
    if box.shape == whole:
        return _Item(item, group, name, tensor)
    empty = not box.volume and _is_not_all(box, whole)
    return _Item(item, group, part_name(name, box), tensor, (whole, box), empty)


def _is_not_all(box: Box, whole: tuple[int, ...]) -> bool:
    """A tensor without elements is stored by the rank whose part begins it."""
    return math.prod(whole) > 0 or any(box.offsets)


def _value(item: WriteItem, planner: SavePlanner) -> Any:
    """The value itself: DCP's own planner would pickle it. What another planner makes of it is bytes, and data too."""
    name = type(planner).__name__
    if isinstance(planner, DefaultSavePlanner) and not _changed(type(planner), "resolve_data", "transform_object"):
        return planner.lookup_object(item.index)
    data = planner.resolve_data(item)
    if not isinstance(data, io.BytesIO):
        return data
    data.seek(0)
    try:
        return torch.load(data, weights_only=True)
    except Exception as error:
        raise UnencodableValueError(
            f"What {name} makes of {item.index.fqn!r} is bytes that torch's safe loader does not take: {error}. Let"
            " its transform_object leave values as they are.",
            key_path=item.index.fqn,
        ) from error


def _changed(kind: type, *methods: str) -> bool:
    return any(getattr(kind, method) is not getattr(DefaultSavePlanner, method) for method in methods)


def _closed(value: Any, path: str) -> Any:
    form = form_of(value)
    if form is None:
        raise UnencodableValueError(
            f"The value at {path!r} holds what cannot be stored as data, and with flatten_state_dict=False it is stored"
            " whole. Leave the planner's flatten_state_dict on, or store plain values.",
            key_path=path,
        )
    return form


def _stored(item: _Item, tree: Any) -> Stored:
    if item.empty:
        return Stored()
    node = (tree[item.group] if item.group else tree)[item.name]
    if isinstance(node, TensorRef):
        return Stored(ref=node)
    return Stored(tree=codec.encode(Tagged(node) if item.closed else node))


def _plans(flattened: Flattened, items: list[_Item], rank: int, ranks: int) -> list[BlobPlan]:
    by_name = {(item.group, item.name): item for item in items if item.part_of is not None}
    parts = {leaf.number: by_name.get((leaf.group, leaf.name)) for leaf in flattened.leaves}
    suffix = "" if ranks == 1 else f"-r{rank:05}"
    plans = [
        plan_blob(
            f"{name.removesuffix('.safetensors')}{suffix}.safetensors",
            group,
            [_part(leaf, parts[leaf.number]) for leaf in leaves],
        )
        for name, group, leaves in files_of(flattened.leaves)
    ]
    return [plan.bound(flattened.tensors) for plan in plans]


def _part(leaf: Leaf, item: _Item | None) -> Leaf:
    """The leaf with what its row says of the whole, whose name in the file is its own without the ranges."""
    if item is None or item.part_of is None:
        return leaf
    whole, box = item.part_of
    return replace(leaf, stride=None, part_of=(leaf.name.removesuffix(part_name("", box)), whole, box.offsets))
