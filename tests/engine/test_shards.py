"""Which indices of a tensor a rank holds, from mesh and placements alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from milepost.engine.shards import box_of, held, local_spans
from milepost.errors import ResumeError


def part(values: torch.Tensor, count: int, number: int) -> torch.Tensor:
    each = -(-len(values) // count)
    return values[number * each : (number + 1) * each]


def indices(spans: list[tuple[int, int]]) -> list[int]:
    return [n for start, stop in spans for n in range(start, stop)]


@settings(max_examples=100, deadline=None, database=None)
@given(st.integers(0, 50), st.integers(1, 5), st.integers(1, 4), st.data())
def test_fsdp_cuts_what_tensor_parallelism_has_cut(size: int, data_ranks: int, tensor_ranks: int, draw: Any) -> None:
    """Also where the parts are not equally large, which reading the placements from left to right gets wrong."""
    at = draw.draw(st.integers(0, data_ranks - 1)), draw.draw(st.integers(0, tensor_ranks - 1))
    placements = [_StridedShard(0, split_factor=tensor_ranks), Shard(0)]
    (found,) = local_spans((size,), (data_ranks, tensor_ranks), placements, at)
    expected = part(part(torch.arange(size), tensor_ranks, at[1]), data_ranks, at[0])
    assert indices(found) == expected.tolist()


@settings(max_examples=100, deadline=None, database=None)
@given(st.integers(0, 40), st.integers(0, 3), st.integers(0, 1))
def test_hybrid_sharding_and_a_second_dimension(size: int, shard: int, column: int) -> None:
    found = local_spans((size, 6), (2, 4, 2), [Replicate(), Shard(0), Shard(1)], (1, shard, column))
    assert indices(found[0]) == part(torch.arange(size), 4, shard).tolist()
    assert indices(found[1]) == [3 * column, 3 * column + 1, 3 * column + 2]


def test_strides_over_something_else_leave_several_boxes() -> None:
    (found,) = local_spans((12,), (2,), [_StridedShard(0, split_factor=3)], (1,))
    assert found == [(2, 4), (6, 8), (10, 12)]


def test_a_sum_that_was_not_made_is_refused() -> None:
    with pytest.raises(ResumeError, match="redistribute"):
        local_spans((4,), (2,), [Partial()], (0,))


def test_a_plain_tensor_is_held_whole_and_a_box_of_it_is_a_view() -> None:
    tensor = torch.arange(12).reshape(3, 4)
    ((box, memory),) = held(tensor)
    assert (box.offsets, box.shape) == ((0, 0), (3, 4)) and memory is tensor
    view = box_of(tensor, (1, 2), (2, 2))
    assert view.tolist() == [[6, 7], [10, 11]] and view.data_ptr() == tensor[1, 2:].data_ptr()
