"""`MilepostReader`: what ``torch.distributed.checkpoint.load`` reads with."""

from __future__ import annotations

import io
import os
from collections.abc import MutableMapping, MutableSequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from milepost import _distributed
from milepost.errors import CheckpointError, CheckpointFormatError, MisconfigurationException
from milepost.integrations.dcp.sources import Request, Source, SourceTensor, open_source


class MilepostReader(StorageReader):
    """Reads checkpoint directories of Milepost's, and those that DCP itself has written.

    ::

        dcp.load(state, storage_reader=MilepostReader("runs/step-00000100"))

    Every byte is verified before it goes anywhere; nothing is unpickled. A rank reads the pieces that its own part
    touches, each once, straight into its tensors.

    Args:
        path: the checkpoint; the `checkpoint_id` of `dcp.load` takes its place.
        unpickle: whether to load values that are pickled, which runs code that the file names.
        threads: that read and verify.

    Raises:
        CheckpointError: as its cause, of the error that DCP raises, with what every rank met.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, unpickle: bool = False, threads: int = 2) -> None:
        self._path = path
        self._unpickle = unpickle
        self._threads = threads
        self._source: Source | None = None
        self._failed: CheckpointError | OSError | None = None

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The path that is read."""
        if self._path is None:
            raise MisconfigurationException("Give MilepostReader a path, or dcp.load a checkpoint_id.")
        return self._path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._close()
        self._path = checkpoint_id or self._path

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds. What is wrong with it `set_up_storage_reader` raises: here DCP would drop it."""
        self._close()
        try:
            self._source = open_source(
                self.checkpoint_id, unpickle=self._unpickle, threads=self._threads, rank=_distributed.rank()
            )
        except (CheckpointError, OSError) as error:
            self._failed = error
            return Metadata({})
        source = self._source
        described: dict[str, STORAGE_TYPES] = {key: _described(tensor) for key, tensor in source.tensors.items()}
        described |= {key: BytesStorageMetadata() for key in source.values}
        return Metadata(described, planner_data=source.paths, storage_meta=StorageMeta(self.checkpoint_id))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if self._failed is not None:
            raise self._failed

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return replace(plan, storage_data=self._opened().identity)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        found = sorted({str(plan.storage_data) for plan in plans})
        if len(found) > 1:
            raise CheckpointFormatError(
                f"{self.checkpoint_id} was replaced while it was opened: the ranks hold {' and '.join(found)}. Load it"
                " again."
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        source = self._opened()
        try:
            taken: list[tuple[ReadItem, torch.Tensor]] = []
            requests: list[Request] = []
            for item in plan.items:
                if item.type == LoadItemType.BYTE_IO:
                    _give_value(planner, item, source.value(item.storage_index.fqn))
                    continue
                target = planner.resolve_tensor(item).detach()
                if target.shape != item.lengths:
                    raise ValueError(
                        f"{item.dest_index.fqn}: the planner gives a tensor of shape {list(target.shape)} for a part"
                        f" of shape {list(item.lengths)}."
                    )
                taken.append((item, target))
                offsets = tuple(item.storage_index.offset or ())
                requests.append(Request(item.storage_index.fqn, offsets, tuple(item.storage_offsets), target))
            source.read(requests)
            for item, target in taken:
                planner.commit_tensor(item, target)
        finally:
            self._close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()

    def _opened(self) -> Source:
        if self._source is None:
            raise MisconfigurationException("MilepostReader reads once for each call of dcp.load.")
        return self._source

    def _close(self) -> None:
        self._failed = None
        if self._source is not None:
            self._source.close()
            self._source = None


def _described(tensor: SourceTensor) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.shape)) for box in tensor.boxes]
    return TensorStorageMetadata(TensorProperties(tensor.dtype), torch.Size(tensor.shape), chunks)


def _give_value(planner: LoadPlanner, item: ReadItem, value: Any) -> None:
    """Hand a value to the planner: as it is where that is one of DCP's, else in the bytes that it expects.

    DCP's own planner would unpickle it; one that has a method of its own for that gets what DCP's `torch.save` makes.
    """
    if not isinstance(planner, DefaultLoadPlanner) or type(planner).load_bytes is not DefaultLoadPlanner.load_bytes:
        data = io.BytesIO()
        torch.save(value, data)
        data.seek(0)
        planner.load_bytes(item, data)
    elif planner.flatten_state_dict:
        _put(planner.original_state_dict, planner.mappings[item.dest_index.fqn], value)
    else:  # DCP's own puts it only into what may be a copy
        planner.state_dict[item.dest_index.fqn] = planner.original_state_dict[item.dest_index.fqn] = value


def _put(state: Any, path: tuple[str | int, ...], value: Any) -> None:
    """Put `value` where `path` leads to. DCP's paths have text for keys that are numbers."""
    for key in path[:-1]:
        state = state[_key(state, key)]
    place: MutableMapping[Any, Any] | MutableSequence[Any] = state
    place[_key(state, path[-1])] = value


def _key(container: Any, key: str | int) -> Any:
    if not isinstance(container, MutableMapping) or key in container:
        return key
    return next((known for known in container if str(known) == key), key)
