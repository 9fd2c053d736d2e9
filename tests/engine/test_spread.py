"""Which box a rank holds of a DTensor: the plan's answer is torch's own, for any mesh and placement."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from milepost.engine.rank_blobs import RankBlobs
from milepost.engine.rank_plan import RankPlan, Tensor
from milepost.engine.spread import Spreads
from milepost.engine.state import Flattened
from milepost.errors import UnencodableValueError


@pytest.fixture
def ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


def made(mesh: DeviceMesh, placements: tuple[Any, ...], shape: tuple[int, ...]) -> DTensor:
    coordinate = mesh.get_coordinate()
    local, _ = _compute_local_shape_and_global_offset(shape, mesh.shape, lambda d: coordinate[d], placements)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        torch.zeros(local), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


MESHES = [((8,), None), ((2, 4), None), ((4, 2), None), ((2, 2, 2), None)]
CASES = [
    (mesh, placements)
    for mesh, _ in MESHES
    for placements in itertools.product([Shard(0), Shard(1), Replicate()], repeat=len(mesh))
] + [
    ((2, 4), (_StridedShard(0, split_factor=4), Shard(0))),
    ((4, 2), (_StridedShard(1, split_factor=2), Shard(1))),
    ((2, 2, 2), (Replicate(), _StridedShard(0, split_factor=2), Shard(0))),
    ((2, 2, 2), (_StridedShard(0, split_factor=4), _StridedShard(0, split_factor=2), Shard(0))),
    ((2, 2, 2), (_StridedShard(0, split_factor=2), Shard(1), Shard(0))),
]  # fmt: skip


def test_every_rank_holds_the_box_that_torch_says(ranks: None) -> None:
    for sizes, placements in CASES:
        mesh = DeviceMesh("cpu", torch.arange(8).reshape(sizes), _init_backend=False)
        strided = any(isinstance(p, _StridedShard) for p in placements)
        for shape in [(16, 32)] if strided else [(16, 32), (7, 5), (3, 1)]:
            sharded = Spreads().of(made(mesh, placements, shape), "x")
            plan = RankPlan([Tensor("model", "x", "float32", 4, 4, shape, sharded.spread)], 8)
            for rank, at in enumerate(itertools.product(*map(range, sizes))):
                local, offset = _compute_local_shape_and_global_offset(shape, sizes, lambda d, at=at: at[d], placements)
                box = plan.local_box(rank, 0)
                assert box is not None and box.shape == tuple(local), (sizes, placements, shape, rank)
                assert not math.prod(local) or box.offsets == tuple(offset), (sizes, placements, shape, rank)


def test_a_mesh_cut_out_of_a_larger_one_is_seen_alike_by_all(ranks: None) -> None:
    """Rank 0's mesh has the ranks 0, 2, 4 and 6. It stands for the others too, or ranks would plan differently."""
    whole = init_device_mesh("cpu", (4, 2), mesh_dim_names=("data", "tensor"))
    spread = Spreads().of(made(whole["data"], (Shard(0),), (8, 4)), "x").spread
    assert spread.ranks == (0, 2, 4, 6, 1, 3, 5, 7) and spread.mesh == (2, 4)
    plan = RankPlan([Tensor("model", "x", "float32", 4, 4, (8, 4), spread)], 8)
    assert [plan.local_box(rank, 0).offsets[0] for rank in range(8)] == [0, 0, 2, 2, 4, 4, 6, 6]  # type: ignore[union-attr]
    assert plan.loads.tolist() == [16] * 8


def test_what_has_no_single_box_is_refused_by_name(ranks: None) -> None:
    mesh = DeviceMesh("cpu", torch.arange(8), _init_backend=False)
    for placement, said in ((Partial(), "partial sums"), (_StridedShard(0, split_factor=2), "more than one box")):
        tensor = DTensor.from_local(
            torch.zeros(2, 2), mesh, (placement,), run_check=False, shape=torch.Size((16, 2)), stride=(2, 1)
        )
        with pytest.raises(UnencodableValueError, match=f"model.w .*{said}"):
            Flattened({"model": {"w": tensor}}, ranks=True)


def test_one_rank_alone_does_not_save_a_part_as_if_it_were_all(ranks: None) -> None:
    tensor = made(DeviceMesh("cpu", torch.arange(8), _init_backend=False), (Shard(0),), (16, 2))
    with pytest.raises(UnencodableValueError, match="over 8 ranks"):
        Flattened({"model": {"w": tensor}})
    alone = made(DeviceMesh("cpu", torch.arange(1), _init_backend=False), (Shard(0),), (16, 2))
    assert Flattened({"model": {"w": alone}}).leaves[0].shape == (16, 2)


def test_a_transposed_view_is_no_tie(ranks: None) -> None:
    """One leaf for both would bring one of them back transposed."""
    mesh = DeviceMesh("cpu", torch.arange(8), _init_backend=False)
    w = DTensor.from_local(torch.arange(9.0).reshape(3, 3), mesh, (Replicate(),), run_check=False)
    flattened = Flattened({"model": {"w": w, "tied": w.detach(), "turned": w.t()}}, ranks=True)
    assert [leaf.name for leaf in flattened.leaves] == ["w", "turned"]
    assert [torch.equal(t, whole.to_local()) for t, whole in zip(flattened.tensors, (w, w.t()), strict=True)] == [
        True
    ] * 2


def test_one_without_elements_is_written_as_the_whole(ranks: None) -> None:
    """Its part on one rank, of shape [2, 0], would stand in the tree for all of [16, 0]."""
    mesh = DeviceMesh("cpu", torch.arange(8), _init_backend=False)
    flattened = Flattened({"model": {"w": made(mesh, (Shard(0),), (16, 0))}}, ranks=True)
    blobs = [RankBlobs(flattened, rank, 8) for rank in range(8)]
    plans = [plan for each in blobs for plan in each.bound(flattened)]
    assert [(leaf.name, leaf.shape, leaf.part_of) for plan in plans for leaf in plan.leaves] == [("w", (16, 0), None)]


def test_ties_are_the_same_for_ranks_that_hold_nothing(ranks: None) -> None:
    mesh = DeviceMesh("cpu", torch.arange(8), _init_backend=False)
    local = torch.zeros(0, 2)
    one, other, apart = (
        DTensor.from_local(t, mesh, (Shard(0),), run_check=False, shape=torch.Size((3, 2)), stride=(2, 1))
        for t in (local, local.detach(), torch.zeros(0, 2))
    )
    flattened = Flattened({"model": {"a": one, "b": other, "c": apart}}, ranks=True)
    assert [leaf.name for leaf in flattened.leaves] == ["a", "c"]
