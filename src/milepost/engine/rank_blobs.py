"""What one of several ranks writes: the blobs of its shares, and where everything then lies."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from milepost.engine import planner
from milepost.engine.rank_plan import RankPlan, Share, Tensor, described, digest
from milepost.engine.requests import BlobPlan, Leaf, unique
from milepost.engine.state import Flattened, torch_type
from milepost.errors import UnencodableValueError
from milepost.format.boxes import Box, part_name
from milepost.format.codec import PartsRef
from milepost.format.layout import ITEM_BYTES
from milepost.format.manifest import Blob

_KEPT = 4


def file_name(name: str, rank: int) -> str:
    """The name of the file of one rank."""
    stem, dot, kind = name.partition(".")
    return f"{stem}-r{rank:05}{dot}{kind}"


class RankBlobs:
    """The plan of a structure, and of it the part of one rank. It holds no tensor.

    Attributes:
        digest: equal on all ranks that save the same structure.
        values: key paths of the values that are each rank's own.
        plans: of the blobs that this rank writes; unbound.
        numbers: from the leaves of the state to the tensors of the plan; those of this rank's own values apart.
        own: from those to the leaves of `plans`.
    """

    def __init__(self, flattened: Flattened, rank: int, world_size: int) -> None:
        self.rank = rank
        self._sharded = flattened.sharded
        own = flattened.own
        shared = [self._whole(leaf) for leaf in flattened.leaves if leaf.number not in own]
        files = planner.files_of(shared)
        self._group = {name: group for name, group, _ in files}
        named = {leaf.number: (name, leaf) for name, _, members in files for leaf in members}
        self._leaves = [named[leaf.number] for leaf in shared]  # in the order of the state
        self._kinds = {leaf.number: torch_type(flattened.tensors[leaf.number], leaf) for leaf in shared}
        self.numbers = {leaf.number: number for number, leaf in enumerate(shared)}
        structure = [self._tensor(name, leaf) for name, leaf in self._leaves]
        self.values = tuple(flattened.own_paths)
        self.digest = digest(structure, self.values)
        self.plan = RankPlan(structure, world_size)
        self._check_held(flattened)
        self._shares = self.plan.shares(rank)
        self._cut_out = [self._held(share) for share in self._shares]
        mine = [flattened.leaves[number] for number in sorted(own)]
        names: set[str] = set()
        self._mine = [
            replace(leaf, name=unique(f"{leaf.group}.{leaf.name}" if leaf.group else leaf.name, names)) for leaf in mine
        ]
        self.own = {leaf.number: len(self._shares) + n for n, leaf in enumerate(self._mine)}
        self.plans = self._blobs()

    @cached_property
    def structure(self) -> list[list[Any]]:
        """As plain data, to be compared with another rank's."""
        return described(self.plan.structure, self.values)

    def bound(self, flattened: Flattened) -> list[BlobPlan]:
        """The plans with the tensors of this save."""
        parts = [
            flattened.tensors[leaf] if box is None else flattened.narrowed(leaf, box) for leaf, box in self._cut_out
        ]
        tensors = [*parts, *(flattened.tensors[leaf.number] for leaf in self._mine)]
        return [plan.bound(tensors) for plan in self.plans]

    # ---- where everything lies -------------------------------------------------------------------------------------

    def places(self, blobs: Sequence[Blob], deltas: Mapping[int, Sequence[int]]) -> list[PartsRef | tuple[int, int]]:
        """Where each tensor of the plan lies once all ranks have written.

        Args:
            blobs: of all ranks, in the order of the head: a delta behind its base.
            deltas: by number of the blob, the rows of its base that are in a delta instead.
        """
        numbers: dict[tuple[str, int], int] = {}
        moved: dict[int, dict[int, tuple[int, int]]] = {}
        for number, blob in enumerate(blobs):
            rank = blob.rank if isinstance(blob.rank, int) else 0
            base = numbers.setdefault((blob.group, rank), number)
            if number in deltas:
                moved[base] = {row: (number, at) for at, row in enumerate(deltas[number])}
        found: list[PartsRef | tuple[int, int]] = []
        for tensor, (name, _) in enumerate(self._leaves):
            group = self._group[name]
            in_blobs = [numbers[group, rank] for rank in self.plan.writers(tensor).tolist()]
            rows = self.plan.rows[tensor].tolist()
            if moved:
                pairs = [moved.get(b, {}).get(r, (b, r)) for b, r in zip(in_blobs, rows, strict=True)]
                in_blobs, rows = [b for b, _ in pairs], [r for _, r in pairs]
            whole = len(rows) == 1
            found.append((in_blobs[0], rows[0]) if whole else PartsRef(tuple(in_blobs), tuple(rows)))
        return found

    # ---- the plan --------------------------------------------------------------------------------------------------

    def _whole(self, leaf: Leaf) -> Leaf:
        """The leaf as all ranks see it."""
        sharded = self._sharded.get(leaf.number)
        if sharded is None:
            return leaf
        if leaf.stored_as is not None:
            kind, _ = leaf.stored_as
            return replace(leaf, shape=sharded.shape, stored_as=(kind, sharded.shape))
        return replace(leaf, shape=sharded.shape, stride=None)

    def _tensor(self, file: str, leaf: Leaf) -> Tensor:
        kind, element_bytes = self._kinds[leaf.number]
        sharded = self._sharded.get(leaf.number)
        shape = leaf.shape if leaf.stored_as is None else leaf.stored_as[1]
        spread = None if sharded is None else sharded.spread
        return Tensor(file, leaf.name, kind, element_bytes, ITEM_BYTES[leaf.dtype], shape, spread)

    def _check_held(self, flattened: Flattened) -> None:
        for number, (_, leaf) in enumerate(self._leaves):
            if leaf.number in self._sharded:
                box = self.plan.local_box(self.rank, number)
                tensor = flattened.tensors[leaf.number]
                held = tuple(tensor.shape) if leaf.stored_as is None else (tensor.numel(),)
                expected = (
                    ()
                    if box is None
                    else box.shape
                    if leaf.stored_as is None
                    else (box.volume * self._kinds[leaf.number][1],)
                )
                if box is not None and held != expected and (box.volume or tensor.numel()):
                    raise UnencodableValueError(
                        f"This rank holds {list(held)} of the DTensor {leaf.group}.{leaf.name} of shape"
                        f" {list(self.plan.structure[number].shape)}; its placements say {list(expected)}.",
                        key_path=f"{leaf.group}.{leaf.name}",
                    )

    def _blobs(self) -> list[BlobPlan]:
        files: dict[str, list[Leaf]] = {name: [] for name in self._group}
        for number, share in enumerate(self._shares):
            name, leaf = self._leaves[share.tensor]
            files[name].append(self._leaf(number, leaf, share))
        plans = [
            planner.plan_blob(file_name(name, self.rank), self._group[name], leaves)
            for name, leaves in files.items()
            if leaves
        ]
        if self._mine:
            leaves = [replace(leaf, number=self.own[leaf.number]) for leaf in self._mine]
            plans.append(planner.plan_blob(file_name(f"{planner.OF_RANK}.safetensors", self.rank), _OWN, leaves))
        return plans

    def _leaf(self, number: int, leaf: Leaf, share: Share) -> Leaf:
        if share.box is None:
            if leaf.stored_as is not None:
                size = self.plan.structure[share.tensor].element_bytes
                for length in leaf.stored_as[1]:
                    size *= length
                return replace(leaf, number=number, shape=(size,))
            return replace(leaf, number=number)
        whole = self.plan.structure[share.tensor].shape
        kind = leaf.stored_as
        return replace(
            leaf,
            number=number,
            name=part_name(leaf.name, share.box),
            shape=share.box.shape if kind is None else (share.box.volume * self._kinds[leaf.number][1],),
            stride=None,
            stored_as=None if kind is None else (kind[0], share.box.shape),
            part_of=(leaf.name, whole, share.box.offsets),
        )

    def _held(self, share: Share) -> tuple[int, Box | None]:
        """The leaf of a share, and where the share lies in what this rank holds of it; None: it is all of that."""
        leaf = self._leaves[share.tensor][1].number
        held = self.plan.local_box(self.rank, share.tensor)
        if share.box is None or held is None or held == share.box:
            return leaf, None
        offsets = tuple(first - start for first, start in zip(share.box.offsets, held.offsets, strict=True))
        return leaf, Box(offsets, share.box.shape)


_OWN = f"{planner.OF_RANK}."


class RankPlanMemory:
    """The plans of the structures that were saved last, as `PlanMemory` for one rank."""

    def __init__(self) -> None:
        self._known: deque[tuple[Any, RankBlobs]] = deque(maxlen=_KEPT)

    def plan(self, flattened: Flattened, rank: int, world_size: int) -> RankBlobs:
        """The plan of a state; made anew only where its structure is."""
        structure = (flattened.structure, rank, world_size)
        for known, blobs in self._known:
            if known == structure:
                return blobs
        blobs = RankBlobs(flattened, rank, world_size)
        self._known.appendleft((structure, blobs))
        return blobs
