"""An unpickler for the ``.metadata`` of torch.distributed.checkpoint (DCP): its opcodes and names only, and stand-ins.

Nothing is imported, nothing that the file names is called, and memory is bounded by the size of the file.
"""

from __future__ import annotations

import pickle
import reprlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from milepost.format.manifest import sound_shape

_METADATA = "torch.distributed.checkpoint.metadata"
DTYPES = {
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "float8_e8m0fnu", "complex128", "complex64", "complex32", "int64", "int32", "int16", "int8", "uint64", "uint32",
    "uint16", "uint8", "bool",
}  # fmt: skip


shown = reprlib.repr


class NotAllowed(Exception):
    """The pickle names what is not on the list."""


class Record:
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
        return Record(self.name, given) if self.plain is None else self.plain(*given)


def sizes_of(sizes: Any = ()) -> tuple[int, ...]:
    """Sizes or offsets, checked. Whatever a file holds is shown cut: a few tuples in each other can be endless text."""
    made = tuple(sizes) if type(sizes) in (tuple, list) else (-1,)
    if not all(type(n) is int and n >= 0 for n in made) or not sound_shape(made):
        raise ValueError(f"sizes of {shown(sizes)}")
    return made


def _joined(*parts: Any) -> str:
    return "/".join(map(_text, parts))


def _text(value: Any = "") -> str:
    if type(value) is not str:
        raise TypeError("no text where one is due")
    return value


def _number(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("no number where one is due")
    return value


def _empty() -> OrderedDict[Any, Any]:
    return OrderedDict()  # what is in it comes later, and its keys are looked at then


_RECORDS = (
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
    "MetadataIndex", "StorageMeta",
)  # fmt: skip
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(_METADATA, name): _Kind(name) for name in _RECORDS},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Kind("_StorageInfo"),
    (_METADATA, "_MEM_FORMAT_ENCODING"): _Kind("memory format", _number),
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): _Kind("TensorProperties"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): _Kind("memory format", _number),
    ("torch", "Size"): _Kind("Size", sizes_of),
    ("torch.serialization", "_get_layout"): _Kind("layout", _text),
    ("collections", "OrderedDict"): _Kind("OrderedDict", _empty),
    **{
        (module, name): _Kind(name, _joined)
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
    **{("torch", name): name for name in DTYPES},
}

_OPCODES = (
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2",
    "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_DICT", "EMPTY_LIST", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL",
)  # fmt: skip


class MetadataUnpickler(pickle._Unpickler):
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
            raise NotAllowed(f"{module}.{name}")
        return found

    def _make(self) -> None:
        given, kind = self.stack.pop(), self.stack.pop()
        if type(kind) is not _Kind:
            raise TypeError("a call of what is no class")
        self.append(kind.make(given))

    def _build(self) -> None:
        state, record = self.stack.pop(), self.stack[-1]
        if type(record) is not Record:
            raise TypeError("a state for what takes none")
        record.fields = state

    def _items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict):
            raise TypeError("items for what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (str, int, Record):  # the hash of tuples in tuples can take forever
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
