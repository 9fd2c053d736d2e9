"""`MilepostSavePlanner`: splits by bytes what ranks have in common. DCP's own gives whole tensors to single ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import _create_write_items

from milepost import _distributed
from milepost.engine.rank_plan import RankPlan, Share, Tensor, digest
from milepost.engine.spread import Spreads, is_dtensor, local_tensor
from milepost.errors import MisconfigurationException, UnencodableValueError
from milepost.format.boxes import Box


@dataclass(frozen=True)
class _Plan(SavePlan):
    """A plan with what it follows from: every rank has worked it out alone, and must have meant the same.

    Attributes:
        structure: digest of the tensors' names, types and layouts.
    """

    structure: str = ""


class MilepostSavePlanner(DefaultSavePlanner):
    """Lets each rank write about as many bytes, also where a few tensors are most of them: large ones are cut.

    ::

        dcp.save(state, storage_writer=MilepostWriter(path), planner=MilepostSavePlanner())

    For the process group of all ranks. Any storage writer takes its plans, DCP's own too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[str, tuple[torch.Tensor, Box]] = {}  # by key: this rank's part of a tensor, and which it is
        self._wanted: dict[tuple[str, Any], Box] = {}  # by key and offsets: what of it this rank writes

    def create_local_plan(self) -> SavePlan:
        if not _distributed.is_initialized():
            return super().create_local_plan()
        tensors, rest = self._described()
        plan = RankPlan(list(tensors.values()), _distributed.world_size())
        keys = list(tensors)
        rank = _distributed.rank()
        boxes = {key: plan.local_box(rank, number) for number, key in enumerate(keys)}
        self._held = {key: (self._local(key), box) for key, box in boxes.items() if box is not None}
        self._wanted = {}
        items = [self._item(keys[share.tensor], share, tensors[keys[share.tensor]]) for share in plan.shares(rank)]
        for key in rest:
            items += _create_write_items(key, self.state_dict[key])
        self.plan = _Plan(items, planner_data=self.mappings, structure=digest(list(tensors.values())))
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        if _distributed.is_initialized():
            if len(all_plans) != _distributed.world_size():
                raise MisconfigurationException(
                    f"MilepostSavePlanner splits over all {_distributed.world_size()} ranks, and {len(all_plans)} save:"
                    " leave process_group out, or give DCP's DefaultSavePlanner."
                )
            if len({plan.structure for plan in all_plans if isinstance(plan, _Plan)}) > 1:
                raise MisconfigurationException(
                    "The ranks have different tensors, and MilepostSavePlanner lets each work out what is its own: give"
                    " all of them the same names, shapes and types, or DCP's DefaultSavePlanner."
                )
        found: tuple[list[SavePlan], Metadata] = super().create_global_plan(all_plans)
        return found

    def lookup_object(self, index: MetadataIndex) -> Any:
        held = self._held.get(index.fqn)
        if held is None:
            return super().lookup_object(index)
        tensor, box = held
        wanted = self._wanted[index.fqn, index.offset]
        for dimension, size in enumerate(wanted.shape):
            tensor = tensor.narrow(dimension, wanted.offsets[dimension] - box.offsets[dimension], size)
        return tensor

    # ---- the plan --------------------------------------------------------------------------------------------------

    def _described(self) -> tuple[dict[str, Tensor], list[str]]:
        """The tensors that are split, and the keys of all else, which is left to DCP's way."""
        spreads, tensors, rest = Spreads(), {}, []
        for key, value in self.state_dict.items():
            try:
                tensors[key] = _tensor(key, value, spreads)
            except UnencodableValueError:
                rest.append(key)
        return tensors, rest

    def _local(self, key: str) -> torch.Tensor:
        value = self.state_dict[key]
        tensor: torch.Tensor = local_tensor(value) if is_dtensor(value) else value
        return tensor.detach()

    def _item(self, key: str, share: Share, tensor: Tensor) -> WriteItem:
        box = share.box or Box((0,) * len(tensor.shape), tensor.shape)
        offsets = torch.Size(box.offsets)
        self._wanted[key, offsets] = box
        data = TensorWriteData(
            ChunkStorageMetadata(offsets, torch.Size(box.shape)),
            TensorProperties.create_from_tensor(self._held[key][0]),
            torch.Size(tensor.shape),
        )
        kind = WriteItemType.TENSOR if share.box is None else WriteItemType.SHARD
        return WriteItem(MetadataIndex(key, offsets), kind, tensor_data=data)


def _tensor(key: str, value: Any, spreads: Spreads) -> Tensor:
    """Raises UnencodableValueError: it is no tensor, or one that is laid out in a way that only DCP knows."""
    sharded = isinstance(value, torch.Tensor) and is_dtensor(value)
    if not sharded and type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise UnencodableValueError(f"{key} is a {type(value).__name__}.")
    spread = spreads.of(value, key).spread if sharded else None
    width = value.element_size()
    return Tensor("", key, str(value.dtype), width, width, tuple(value.shape), spread)
