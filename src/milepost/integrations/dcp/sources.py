"""What a reader for DCP reads from: a checkpoint directory of Milepost's, or one that DCP itself has written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from milepost import _distributed
from milepost.engine.loading import read_tensors
from milepost.engine.locating import Located
from milepost.engine.reader import StoredCheckpoint
from milepost.engine.requests import Destination
from milepost.engine.state import own_values, rebuild, references, stored_type
from milepost.engine.writer import Workers
from milepost.errors import CheckpointFormatError
from milepost.format.boxes import Box
from milepost.format.codec import PartsRef, RanksRef, TensorRef
from milepost.format.distcp import Chunk, is_distcp
from milepost.format.distcp_files import DistcpFiles
from milepost.format.manifest import HEAD_NAME
from milepost.format.parts import parted
from milepost.format.regions import region
from milepost.integrations.dcp.foreign import as_tensor, value_of
from milepost.integrations.dcp.nesting import KeyPath


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor as it is stored: in boxes that fill its shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


class Request(NamedTuple):
    """A part of a stored box, and the tensor of its size that takes it, on any device and of any type."""

    key: str
    box: tuple[int, ...]
    """Offsets of the stored box."""
    offsets: tuple[int, ...]
    """Of the part, within the stored box."""
    target: torch.Tensor


class Source(Protocol):
    """An opened checkpoint.

    Attributes:
        identity: equal where two ranks have opened the same one.
        tensors, values: by key; the keys are those that DCP gives, key paths joined by dots.
        paths: the key path of each key.
    """

    identity: str
    tensors: dict[str, SourceTensor]
    values: list[str]
    paths: dict[str, KeyPath]

    def value(self, key: str) -> Any:
        """What is no tensor. No code of the file is run unless that was asked for."""

    def read(self, requests: Sequence[Request]) -> None:
        """Read parts of tensors, verified, into the tensors given."""

    def close(self) -> None:
        """Let go of its files."""


def open_source(path: str | os.PathLike[str], *, unpickle: bool, threads: int, rank: int = 0) -> Source:
    """Open a checkpoint of either kind. Where both lie in one directory, Milepost's is taken.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if is_distcp(path) and not (Path(path) / HEAD_NAME).is_file():
        return DistcpSource(DistcpFiles(path), unpickle)
    return DirectorySource(StoredCheckpoint(os.path.abspath(path)), unpickle, threads, rank)  # noqa: PTH100


class DirectorySource:
    """A checkpoint directory of Milepost's, saved by a `Checkpointer` or through DCP, by any number of ranks."""

    def __init__(self, stored: StoredCheckpoint, unpickle: bool, threads: int, rank: int) -> None:
        self._stored = stored
        self._unpickle = unpickle
        self._workers = Workers(threads)
        self._rank = rank
        self._located = Located(stored, rank)
        self._leaves: dict[str, Any] = {}
        self._rows: dict[tuple[str, tuple[int, ...]], TensorRef] = {}
        self.identity = f"step {stored.head.step} of {stored.head.time}, {stored.head.tree.xxh3_128}"
        self.tensors: dict[str, SourceTensor] = {}
        self.values: list[str] = []
        self.paths: dict[str, KeyPath] = {}
        try:
            self._look_through()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._stored.close()
        self._workers.close()

    def _look_through(self) -> None:
        for path, leaf in _leaves((), self._stored.tree):
            key = ".".join(map(str, path))
            if key in self.paths:
                raise CheckpointFormatError(
                    f"{self._stored.path}: {path} and {self.paths[key]} are both {key!r} to DCP. Load it with"
                    " milepost.Checkpointer."
                )
            self.paths[key] = path
            if not isinstance(leaf, (TensorRef, PartsRef)):
                self._leaves[key] = leaf
                self.values.append(key)
                continue
            self.tensors[key], rows = self._described(leaf)
            self._rows.update({(key, box.offsets): row for box, row in rows})

    def _described(self, leaf: TensorRef | PartsRef) -> tuple[SourceTensor, list[tuple[Box, TensorRef]]]:
        if isinstance(leaf, TensorRef):
            dtype, shape = stored_type(self._stored.index(leaf.blob), leaf.row)
            rows = [(Box((0,) * len(shape), shape), leaf)]
        else:
            whole = parted(leaf, self._stored.index, self._stored.path)
            shape, rows = whole.shape, [(box, row) for row, box in whole.parts]
            dtype, _ = stored_type(self._stored.index(leaf.blobs[0]), leaf.rows[0])
        return SourceTensor(dtype, shape, tuple(box for box, _ in rows)), rows

    # ---- reading ---------------------------------------------------------------------------------------------------

    def value(self, key: str) -> Any:
        leaf = self._leaves[key]
        if isinstance(leaf, RanksRef):
            several = len(self._stored.head.rank_trees())
            rank = self._rank if several == _distributed.world_size() else None
            leaf = own_values(leaf, self._stored.rank_tree, rank, several)
        tensors = read_tensors(self._stored, self._located, self._workers, references(leaf), {})
        return rebuild(leaf, tensors.__getitem__, self._unpickle)

    def read(self, requests: Sequence[Request]) -> None:
        wanted: dict[int, list[Destination]] = {}
        keep: list[tuple[torch.Tensor, torch.Tensor]] = []  # what is written into, and what it stands for
        for key, box, offsets, target in requests:
            ref = self._rows[key, box]
            index = self._stored.index(ref.blob)
            dtype, shape = stored_type(index, ref.row)
            memory = target if _takes_bytes(target, dtype) else torch.empty(target.shape, dtype=dtype)
            keep.append((memory, target))
            width = dtype.itemsize
            at = region(shape, offsets, tuple(memory.shape), width, tuple(width * s for s in memory.stride()))
            start = index.starts[ref.row]
            to = Destination(start + at.start, start + at.stop, memory.data_ptr(), at.run, at.steps)
            wanted.setdefault(ref.blob, []).append(to)
        self._stored.read(wanted, self._workers)
        for memory, target in keep:
            if memory is not target:
                target.copy_(memory)


class DistcpSource:
    """A checkpoint that DCP itself has written."""

    def __init__(self, files: DistcpFiles, unpickle: bool) -> None:
        self._files = files
        self._unpickle = unpickle
        found = files.metadata
        self.identity = str(sorted(found.items.items(), key=str)[:1])
        self.tensors = {
            key: SourceTensor(getattr(torch, t.dtype), t.shape, tuple(Box(*chunk) for chunk in t.chunks))
            for key, t in found.tensors.items()
        }
        self.values = list(found.values)
        self.paths: dict[str, KeyPath] = {key: found.paths.get(key, (key,)) for key in (*found.tensors, *found.values)}

    def close(self) -> None:
        self._files.close()

    def value(self, key: str) -> Any:
        return value_of(self._files, key, unpickle=self._unpickle)

    def read(self, requests: Sequence[Request]) -> None:
        """Each stored box is read once, whole: the checksum is over all of it."""
        by_box: dict[tuple[str, tuple[int, ...]], list[Request]] = {}
        for request in requests:
            by_box.setdefault((request.key, request.box), []).append(request)
        for (key, offsets), some in by_box.items():
            described = self._files.metadata.tensors[key]
            chunk = next(c for c in described.chunks if c.offsets == offsets)
            box = as_tensor(self._files.chunk(key, Chunk(*chunk)), described.dtype)
            for request in some:
                request.target.copy_(_part(box, Box(request.offsets, tuple(request.target.shape))))


def _leaves(path: KeyPath, tree: Any) -> Iterator[tuple[KeyPath, Any]]:
    """The leaves that DCP would find in the state: it looks into dicts, and into lists that hold tensors or dicts."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves((*path, str(key)), value)
    elif isinstance(tree, list) and _holds_more(tree):
        for place, value in enumerate(tree):
            yield from _leaves((*path, place), value)
    else:
        yield path, tree


def _holds_more(values: list[Any]) -> bool:
    return any(isinstance(v, (TensorRef, PartsRef, dict)) or (isinstance(v, list) and _holds_more(v)) for v in values)


def _takes_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether stored bytes can be copied straight into its memory."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return (
        plain and tensor.device.type == "cpu" and tensor.dtype == dtype and not tensor.is_conj() and not tensor.is_neg()
    )


def _part(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(first, first + size) for first, size in zip(box.offsets, box.shape, strict=True))]


def is_container(value: Any) -> bool:
    """Whether DCP would look into a value, were it a part of a state."""
    if isinstance(value, dict):
        return True
    return isinstance(value, list) and any(isinstance(v, torch.Tensor) or is_container(v) for v in value)
