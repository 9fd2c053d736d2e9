"""Checkpoints of torch.distributed.checkpoint (DCP): ``.metadata`` and ``.distcp`` files, read without torch.

``.metadata`` is a pickle. Here it is read by an unpickler that knows only the opcodes and names that DCP writes, and
puts stand-ins in the place of its classes: nothing is imported, nothing that the file names is called.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from milepost.errors import CheckpointFormatError, UnsafeCheckpointError
from milepost.format.distcp_pickle import DTYPES, MetadataUnpickler, NotAllowed, Record, shown, sizes_of

METADATA_NAME = ".metadata"
LIGHTNING_NAME = "meta.pt"
"""Beside it, in Lightning's sharded checkpoints: a torch file of all that is neither weights nor optimizer state."""

_RANK_METADATA = re.compile(r"__\d+\.metadata")


class Chunk(NamedTuple):
    """A box of a tensor, which was saved by itself."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor of the checkpoint.

    Attributes:
        dtype: torch's name.
        shape: of the whole.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: list[Chunk]


class Item(NamedTuple):
    """Where a chunk or a value lies: a torch file of its own within a file of the checkpoint."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Metadata:
    """What ``.metadata`` says.

    Attributes:
        tensors: by key, which is the key path joined by dots.
        values: keys of what is no tensor.
        paths: by key, the key path: text for a key of a dict, a number for a place in a list.
        items: by key and offsets; for a value by key and None.
    """

    tensors: dict[str, ChunkedTensor] = field(default_factory=dict)
    values: list[str] = field(default_factory=list)
    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    items: dict[tuple[str, tuple[int, ...] | None], Item] = field(default_factory=dict)

    def item(self, key: str, offsets: tuple[int, ...] | None = None) -> Item:
        """Where a chunk lies, or the value of `key`.

        Raises:
            CheckpointFormatError: it is described, but nothing says where it lies.
        """
        found = self.items.get((key, offsets))
        if found is None and (offsets is None or not any(offsets)):  # written whole by an old DCP: without offsets
            found = self.items.get((key, None))
        if found is None:
            raise CheckpointFormatError(f"{METADATA_NAME} does not say where {key!r} at {offsets} is stored.")
        return found


def is_distcp(directory: str | os.PathLike[str]) -> bool:
    """Whether `directory` is a checkpoint of DCP."""
    return bool(metadata_files(directory))


def metadata_files(directory: str | os.PathLike[str]) -> list[str]:
    """Names of the files that describe the checkpoint: one, or one of each rank where ranks saved by themselves."""
    try:
        names = os.listdir(directory)  # noqa: PTH208
    except OSError:
        return []
    return [METADATA_NAME] if METADATA_NAME in names else sorted(filter(_RANK_METADATA.fullmatch, names))


def decode(data: bytes, path: str) -> Metadata:
    """Read the bytes of ``.metadata``.

    Raises:
        UnsafeCheckpointError: it names something that DCP does not write there. Nothing of it was called.
        CheckpointFormatError: it is no such file, or contradicts itself.
    """
    try:
        read = MetadataUnpickler(io.BytesIO(data)).load()
        if not isinstance(read, Record) or read.name != "Metadata":
            raise TypeError("it holds no Metadata")
        return _checked(read)
    except NotAllowed as found:
        raise UnsafeCheckpointError(
            f"{path} names {found.args[0]}, which is nothing that torch.distributed.checkpoint writes there. Loading"
            " it could run code, and nothing but torch's own loader would do: do so only if you trust the file.",
            path=path,
            key_path=found.args[0],
        ) from None
    except Exception as error:  # a damaged or hostile pickle may fail anywhere
        raise CheckpointFormatError(
            f"{path} is no metadata of torch.distributed.checkpoint: {type(error).__name__}: {error}"
        ) from error


def merge(parts: Iterable[Metadata]) -> Metadata:
    """One description from that of each rank."""
    whole = Metadata()
    for part in parts:
        for key, tensor in part.tensors.items():
            known = whole.tensors.setdefault(key, ChunkedTensor(tensor.dtype, tensor.shape, []))
            if (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
                raise CheckpointFormatError(f"The ranks describe {key!r} differently.")
            known.chunks.extend(chunk for chunk in tensor.chunks if chunk not in known.chunks)
        whole.values.extend(key for key in part.values if key not in whole.values)
        whole.paths.update(part.paths)
        whole.items.update(part.items)
    return whole


class Slice(io.RawIOBase):
    """A range of an open file, as a file."""

    def __init__(self, file: IO[bytes], item: Item) -> None:
        self.item = item
        self._file = file
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.item.length}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to {start + offset}")
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(self.item.length - self._place, 0)]
        data = os.pread(self._file.fileno(), len(view), self.item.start + self._place)
        view[: len(data)] = data
        self._place += len(data)
        return len(data)


# ---- what was read, checked ------------------------------------------------------------------------------------------


def _checked(read: Record) -> Metadata:
    made = Metadata()
    for key, described in _dict(_get(read, "state_dict_metadata")).items():
        name = _text(key)
        if _is(described, "BytesStorageMetadata"):
            made.values.append(name)
        else:
            made.tensors[name] = _tensor(described)
    paths = read.fields.get("planner_data") or {}
    for key, path in _dict(paths).items():
        made.paths[_text(key)] = _key_path(path)
    for index, info in _dict(_get(read, "storage_data")).items():
        offset = _get(index, "offset", "MetadataIndex", optional=True)
        place = (_text(_get(index, "fqn", "MetadataIndex")), None if offset is None else sizes_of(offset))
        made.items[place] = _item(info, place[0])
    return made


def _tensor(described: Any) -> ChunkedTensor:
    shape = sizes_of(_get(described, "size", "TensorStorageMetadata"))
    properties = _get(described, "properties", "TensorStorageMetadata")
    state = properties.fields if _is(properties, "TensorProperties") else None
    dtype = state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f"a tensor of the type {shown(dtype)}")
    chunks = [
        Chunk(sizes_of(_get(c, "offsets", "ChunkStorageMetadata")), sizes_of(_get(c, "sizes", "ChunkStorageMetadata")))
        for c in _get(described, "chunks", "TensorStorageMetadata")
    ]
    for chunk in chunks:
        if not len(chunk.offsets) == len(chunk.shape) == len(shape) or any(
            start + size > whole for start, size, whole in zip(*chunk, shape, strict=True)
        ):
            raise ValueError(f"a chunk at {chunk.offsets} of shape {chunk.shape} in a tensor of shape {shape}")
    return ChunkedTensor(str(dtype), shape, chunks)


def _item(info: Any, key: str) -> Item:
    file, start, length = (_get(info, name, "_StorageInfo") for name in ("relative_path", "offset", "length"))
    if transforms := _get(info, "transform_descriptors", "_StorageInfo", optional=True):
        raise ValueError(f"{key!r} went through the extensions {shown(transforms)}, which are not known here")
    if type(file) is not str or not file or file != os.path.basename(file) or file in (".", "..") or "\0" in file:  # noqa: PTH119
        raise ValueError(f"{key!r} in the file {shown(file)}")
    if type(start) is not int or type(length) is not int or min(start, length) < 0:
        raise ValueError(f"{key!r} at bytes {shown(start)} and the length {shown(length)}")
    return Item(file, start, length)


def _key_path(path: Any) -> tuple[str | int, ...]:
    if type(path) is not tuple or not path or not all(type(key) in (str, int) for key in path):
        raise ValueError(f"the key path {shown(path)}")
    return path


def _is(value: Any, name: str) -> bool:
    return type(value) is Record and value.name == name


def _get(value: Any, name: str, kind: str | None = None, *, optional: bool = False) -> Any:
    if type(value) is not Record or (kind is not None and value.name != kind) or type(value.fields) is not dict:
        raise TypeError(f"no {kind or 'record'} where one is due")
    return value.fields.get(name) if optional else value.fields[name]


def _dict(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"a {type(value).__name__} instead of a dict")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"a {type(value).__name__} instead of text")
    return value
