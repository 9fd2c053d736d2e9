"""How long many ranks take to find out who writes what, beside torch.distributed.checkpoint's own planner.

``python benchmarks/planning.py`` simulates the ranks in one process, on one core. Here every rank plans alone, so that
one plan is what each of them waits for. DCP's ranks make local plans, one of them makes the global plan out of all of
these, and sends each its own back: counted are one local plan and the global one, not what is sent. ``--dcp 0`` leaves
DCP out.
"""

from __future__ import annotations

import argparse
import math
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from milepost.engine.rank_blobs import RankBlobs, RankPlanMemory
from milepost.engine.rank_plan import RankPlan, Spread, Tensor
from milepost.engine.state import Flattened

SHAPES = [(4096, 4096), (4096,), (11008, 4096), (4096,)]  # of a language model's layers: large ones, and norms
LAYOUTS: dict[str, Callable[[int], tuple[tuple[int, ...], tuple[Any, ...]]]] = {
    "fsdp": lambda n: ((n,), (Shard(0),)),
    "hsdp": lambda n: ((2, n // 2), (Replicate(), Shard(0))),
    "fsdp x tp": lambda n: ((n // 8, 8), (Shard(0), Shard(1))),
    "ddp": lambda n: ((n,), ()),
}


def structure(layout: str, ranks: int, tensors: int) -> list[Tensor]:
    mesh, placements = LAYOUTS[layout](ranks)
    spread = Spread(
        tuple(range(ranks)),
        mesh,
        tuple((p.dim, axis) for axis, p in enumerate(placements) if isinstance(p, Shard)),
    )
    found = []
    for number in range(tensors):
        shape = SHAPES[number % len(SHAPES)]
        own = Spread(spread.ranks, spread.mesh, tuple(cut for cut in spread.cuts if cut[0] < len(shape)))
        found.append(
            Tensor("model", f"layers.{number}.weight", "torch.float32", 4, 4, shape, own if placements else None)
        )
    return found


def state(layout: str, ranks: int, tensors: int) -> dict[str, torch.Tensor]:
    """What rank 0 of so many would have, without memory for its elements."""
    sizes, placements = LAYOUTS[layout](ranks)
    mesh = init_device_mesh("cpu", sizes)
    found: dict[str, torch.Tensor] = {}
    for number in range(tensors):
        shape = SHAPES[number % len(SHAPES)]
        if not placements:
            found[f"layers.{number}.weight"] = torch.empty(1).expand(shape)
            continue
        own = [p if not isinstance(p, Shard) or p.dim < len(shape) else Replicate() for p in placements]
        local = list(shape)
        for size, placement in zip(sizes, own, strict=True):
            if isinstance(placement, Shard):
                local[placement.dim] = -(-local[placement.dim] // size)
        stride = torch.empty(shape, device="meta").stride()
        found[f"layers.{number}.weight"] = DTensor.from_local(
            torch.empty(local), mesh, own, run_check=False, shape=torch.Size(shape), stride=stride
        )
    return found


@contextmanager
def simulated(ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def timed(act: Callable[[], Any], times: int = 3) -> tuple[float, Any]:
    """The quickest of a few."""
    best, made = math.inf, None
    for _ in range(times):
        begun = time.perf_counter()
        made = act()
        best = min(best, time.perf_counter() - begun)
    return best, made


def plan_here(layout: str, ranks: int, tensors: int) -> str:
    given = structure(layout, ranks, tensors)
    seconds, plan = timed(lambda: RankPlan(given, ranks))
    of_one, _ = timed(lambda: plan.shares(0))
    tracemalloc.start()
    kept = RankPlan(given, ranks)
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    begun = time.perf_counter()
    parts = sum(len(rows) for rows in kept.rows)
    rows = time.perf_counter() - begun
    balance = plan.loads.max() / plan.loads.mean()
    return (
        f"{layout:10} {ranks:5} ranks x {tensors} tensors: plan {seconds:6.3f} s, a share of it {of_one:6.4f} s;"
        f" {memory / 1e6:5.1f} MB; rank 0's rows of {parts} parts {rows:6.3f} s; max / mean {balance:.3f}"
    )


def cached_here(layout: str, ranks: int, tensors: int) -> str:
    """From a state to the plan with its tensors, at the first save and at later ones."""
    with simulated(ranks):
        live = {"model": state(layout, ranks, tensors)}
        first, _ = timed(lambda: RankBlobs(Flattened(live, ranks=True), 0, ranks), 1)
        memory = RankPlanMemory()
        flattened = Flattened(live, ranks=True)
        memory.plan(flattened, 0, ranks).bound(flattened)
        again, _ = timed(lambda: memory.plan(flattened, 0, ranks).bound(flattened))
        walk, _ = timed(lambda: Flattened(live, ranks=True))
    return (
        f"{layout:10} {ranks:5} ranks x {tensors} tensors: a state's first plan {first:6.3f} s; later, the plan that is"
        f" kept {again * 1e3:5.1f} ms, after finding the tensors, {walk * 1e3:5.1f} ms"
    )


def _of_rank(plan: Any, rank: int) -> Any:
    """Rank 0's local plan of rows as another rank would have made it."""
    items = []
    for item in plan.items:
        chunk = item.tensor_data.chunk
        offsets = torch.Size((rank * chunk.sizes[0], *chunk.offsets[1:]))
        data = replace(item.tensor_data, chunk=replace(chunk, offsets=offsets))
        items.append(replace(item, index=replace(item.index, offset=offsets), tensor_data=data))
    return replace(plan, items=items)


def plan_dcp(layout: str, ranks: int, tensors: int) -> str:
    with simulated(ranks):
        live = state(layout, ranks, tensors)
        planner = DefaultSavePlanner()
        planner.set_up_planner(live, is_coordinator=True)
        local, plan = timed(planner.create_local_plan, 1)
        plans = [_of_rank(plan, rank) for rank in range(ranks)]
        begun = time.perf_counter()
        planner.create_global_plan(plans)
        whole = time.perf_counter() - begun
    return f"DCP, {layout:5} {ranks:5} ranks x {tensors} tensors: local plan {local:6.3f} s, global plan {whole:6.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 64, 256, 1024])
    parser.add_argument("--tensors", type=int, default=2000)
    parser.add_argument("--dcp", type=int, nargs="*", default=[8, 64, 256], help="numbers of ranks for DCP; 0: none")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for ranks in given.ranks:
        for layout in LAYOUTS:
            print(plan_here(layout, ranks, given.tensors), flush=True)
    for layout in LAYOUTS:
        print(cached_here(layout, max(given.ranks), given.tensors), flush=True)
    for ranks in given.dcp:
        if ranks:
            print(plan_dcp("fsdp", ranks, given.tensors), flush=True)


if __name__ == "__main__":
    main()
