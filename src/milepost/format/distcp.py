"""Checkpoints of torch.distributed.checkpoint (DCP): ``.metadata`` and ``.distcp`` files, read without torch.

``.metadata`` is a pickle. Here it is read by an unpickler that knows only the opcodes and names that DCP writes, and
puts stand-ins in the place of its classes: nothing is imported, nothing that the file names is called.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import IO, Any, ClassVar, NamedTuple

from milepost.errors import CheckpointFormatError, UnsafeCheckpointError
from milepost.format.manifest import sound_shape

METADATA_NAME = ".metadata"
LIGHTNING_NAME = "meta.pt"
"""Beside it, in Lightning's sharded checkpoints: a torch file of all that is neither weights nor optimizer state."""

_METADATA = "torch.distributed.checkpoint.metadata"
_DTYPES = {
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "float8_e8m0fnu", "complex128", "complex64", "complex32", "int64", "int32", "int16", "int8", "uint64", "uint32",
    "uint16", "uint8", "bool",
}  # fmt: skip
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
        read = _Unpickler(io.BytesIO(data)).load()
        if not isinstance(read, _Record) or read.name != "Metadata":
            raise TypeError("it holds no Metadata")
        return _checked(read)
    except _NotAllowed as found:
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


# ---- the unpickler ---------------------------------------------------------------------------------------------------


class _NotAllowed(Exception):
    """The pickle names what is not on the list."""


class _Record:
    """Stands for an object of one of DCP's classes."""

    def __init__(self, name: str, given: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.given = given
        self.fields: Any = {}


class _Kind(NamedTuple):
    """Stands for one of DCP's classes, or for a function that makes a plain value."""

    name: str
    plain: Callable[..., Any] | None = None

    def make(self, given: Any) -> Any:
        if type(given) is not tuple:
            raise TypeError("arguments that are none")
        return _Record(self.name, given) if self.plain is None else self.plain(*given)


def _sizes(sizes: Any = ()) -> tuple[int, ...]:
    made = tuple(sizes)
    if type(sizes) not in (tuple, list) or not all(type(n) is int and n >= 0 for n in made) or not sound_shape(made):
        raise ValueError(f"sizes of {sizes!r:.60}")
    return made


def _joined(*parts: str) -> str:
    return "/".join(map(str, parts))


_RECORDS = (
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
    "MetadataIndex", "StorageMeta",
)  # fmt: skip
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(_METADATA, name): _Kind(name) for name in _RECORDS},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Kind("_StorageInfo"),
    (_METADATA, "_MEM_FORMAT_ENCODING"): _Kind("memory format", int),
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): _Kind("TensorProperties"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): _Kind("memory format", int),
    ("torch", "Size"): _Kind("Size", _sizes),
    ("torch.serialization", "_get_layout"): _Kind("layout", str),
    ("collections", "OrderedDict"): _Kind("OrderedDict", OrderedDict),
    **{
        (module, name): _Kind(name, _joined)
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
    **{("torch", name): name for name in _DTYPES},
}

_OPCODES = (
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2",
    "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_DICT", "EMPTY_LIST", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL",
)  # fmt: skip


class _Unpickler(pickle._Unpickler):
    """Python's own, with DCP's opcodes only; what makes or changes objects is replaced."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Any]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES
    }

    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        if found is None:
            raise _NotAllowed(f"{module}.{name}")
        return found

    def _make(self) -> None:
        given, kind = self.stack.pop(), self.stack.pop()
        if type(kind) is not _Kind:
            raise TypeError("a call of what is no class")
        self.append(kind.make(given))

    def _build(self) -> None:
        state, record = self.stack.pop(), self.stack[-1]
        if type(record) is not _Record:
            raise TypeError("a state for what takes none")
        record.fields = state

    def _items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict):
            raise TypeError("items for what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (str, int, _Record):  # the hash of tuples in tuples can take forever
                raise TypeError(f"a key that is a {type(key).__name__}")
            target[key] = value

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._items([key, value])

    def _setitems(self) -> None:
        self._items(self.pop_mark())

    def _extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError("items for what is no list")
        self.stack[-1].extend(values)

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self.pop_mark())

    dispatch.update(
        {
            pickle.REDUCE[0]: _make, pickle.NEWOBJ[0]: _make, pickle.BUILD[0]: _build, pickle.SETITEM[0]: _setitem,
            pickle.SETITEMS[0]: _setitems, pickle.APPEND[0]: _append, pickle.APPENDS[0]: _appends,
        }
    )  # fmt: skip


# ---- what was read, checked ------------------------------------------------------------------------------------------


def _checked(read: _Record) -> Metadata:
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
        place = (_text(_get(index, "fqn", "MetadataIndex")), None if offset is None else _sizes(offset))
        made.items[place] = _item(info, place[0])
    return made


def _tensor(described: Any) -> ChunkedTensor:
    shape = _sizes(_get(described, "size", "TensorStorageMetadata"))
    properties = _get(described, "properties", "TensorStorageMetadata")
    state = properties.fields if _is(properties, "TensorProperties") else None
    dtype = state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
    if dtype not in _DTYPES:
        raise ValueError(f"a tensor of the type {dtype!r:.60}")
    chunks = [
        Chunk(_sizes(_get(c, "offsets", "ChunkStorageMetadata")), _sizes(_get(c, "sizes", "ChunkStorageMetadata")))
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
        raise ValueError(f"{key!r} went through the extensions {transforms!r:.60}, which are not known here")
    if type(file) is not str or not file or file != os.path.basename(file) or file in (".", "..") or "\0" in file:  # noqa: PTH119
        raise ValueError(f"{key!r} in the file {file!r:.60}")
    if type(start) is not int or type(length) is not int or min(start, length) < 0:
        raise ValueError(f"{key!r} at bytes {start!r:.30} and the length {length!r:.30}")
    return Item(file, start, length)


def _key_path(path: Any) -> tuple[str | int, ...]:
    if type(path) is not tuple or not path or not all(type(key) in (str, int) for key in path):
        raise ValueError(f"the key path {path!r:.60}")
    return path


def _is(value: Any, name: str) -> bool:
    return type(value) is _Record and value.name == name


def _get(value: Any, name: str, kind: str | None = None, *, optional: bool = False) -> Any:
    if type(value) is not _Record or (kind is not None and value.name != kind) or type(value.fields) is not dict:
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
