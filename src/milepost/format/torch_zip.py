"""What is in torch's zip file, read without torch and without running the code its pickle names."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from typing import IO, Any, ClassVar, NamedTuple

from milepost.errors import CheckpointFormatError


class _Inert:
    """Stands for anything a pickle names that is not plain. Building it runs nothing."""

    _name = ""
    _global = ""
    _given: tuple[Any, ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = object.__new__(cls)
        made._given = args
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


class _Storage:
    """A tensor's memory, by the name of its record: ``data/<key>``; `kind` is the class that the pickle names."""

    def __init__(self, key: str, kind: str = "") -> None:
        self.key = key
        self.kind = kind


class StoredTensor(NamedTuple):
    """A tensor in a torch file.

    Attributes:
        dtype: as safetensors names it, or torch's own name where that has none.
        offset, stride: in elements, in the memory of the record.
        record: name in the archive.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    record: str


_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip
_TYPES = {
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "uint16": "U16",
    "uint32": "U32", "uint64": "U64",
}  # fmt: skip


_DEEPEST = 200
_PLAIN = {("collections", "OrderedDict"): OrderedDict}  # no dict: state_dict() hangs _metadata on it


class _InertUnpickler(pickle._Unpickler):
    """Python's own, not the one in C: that gets memory for any place that a file names in its memo."""

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch}

    def _load_bytearray(self) -> None:  # gets memory for any size that a file names
        raise pickle.UnpicklingError("torch writes no bytearray of this protocol")

    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[(module, name)]
        harmless = module == "torch" or module.startswith(("torch._utils", "torch.storage"))
        return type(
            "Inert", (_Inert,), {"_name": "" if harmless else f"{module}.{name}", "_global": f"{module}.{name}"}
        )

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 3:
            return None
        return _Storage(str(pid[2]), getattr(pid[1], "_global", "").rpartition(".")[2])


def check_sizes(archive: zipfile.ZipFile) -> None:
    """Refuse records that take more room unpacked than the file does: they are compressed, or lie over each other.

    Raises:
        CheckpointFormatError: torch writes none such, and a few kilobytes of them could fill any memory.
    """
    assert archive.fp is not None
    size, unpacked = archive.fp.seek(0, io.SEEK_END), sum(entry.file_size for entry in archive.infolist())
    if unpacked > size:
        raise CheckpointFormatError(
            f"The records of {archive.filename or 'the archive'} take {unpacked} bytes, and the file has {size}. If"
            " you trust it, unpack it and pack it without compression, as torch does."
        )


def _tree(archive: zipfile.ZipFile) -> Any:
    check_sizes(archive)
    name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
    return _InertUnpickler(io.BytesIO(archive.read(name))).load()


def contents(file: IO[bytes] | io.RawIOBase) -> Any:
    """The nested content of a torch file, tensors as `StoredTensor`. Other types stand as the text ``<their name>``.

    Raises:
        CheckpointFormatError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            prefix = next(n for n in archive.namelist() if n.endswith("/data.pkl")).removesuffix("data.pkl")
            return _described(_tree(archive), prefix, 0)
    except CheckpointFormatError:
        raise
    except Exception as error:  # a hostile or foreign pickle may fail anywhere
        raise CheckpointFormatError(f"It is no file of torch: {type(error).__name__}: {error}") from error


def _described(value: Any, prefix: str, depth: int) -> Any:
    if depth > _DEEPEST:
        raise ValueError(f"nested deeper than {_DEEPEST} levels")
    if isinstance(value, dict):
        return {key: _described(item, prefix, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_described(item, prefix, depth + 1) for item in value)
    if _is_inert(value):
        return _tensor(value, prefix) or f"<{value._global}>"
    return value


def _tensor(value: Any, prefix: str) -> StoredTensor | None:
    if value._global == "torch._utils._rebuild_parameter" and value._given and _is_inert(value._given[0]):
        value = value._given[0]
    if value._global not in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
        return None
    storage, offset, shape, stride = value._given[:4]
    named = value._given[6]._global.rpartition(".")[2] if len(value._given) > 6 else ""
    dtype = _STORAGES.get(storage.kind) or _TYPES.get(named, named)
    return StoredTensor(dtype, tuple(shape), tuple(stride), int(offset), f"{prefix}data/{storage.key}")


def refused_value(file: IO[bytes] | io.RawIOBase) -> tuple[str, str] | None:
    """Key path and type of the first value in a torch file that is not plain data, found without running its code."""
    try:
        with zipfile.ZipFile(file) as archive:
            for path, value in _walk(_tree(archive)):
                name = value._name if _is_inert(value) else ""
                if name:
                    return path, name
    except Exception:  # a hostile or foreign pickle may fail anywhere; the caller then reports torch's own refusal
        return None
    return None


def tensors_of_records(archive: zipfile.ZipFile) -> dict[str, list[str]]:
    """For the name of each tensor record, the key paths of the tensors in it: several where they are tied.

    Empty where the pickle that says so cannot be read.
    """
    found: dict[str, list[str]] = {}
    try:
        prefix = next(n for n in archive.namelist() if n.endswith("/data.pkl")).removesuffix("data.pkl")
        for path, value in _walk(_tree(archive)):
            for key in _storage_keys(value):
                found.setdefault(f"{prefix}data/{key}", []).append(path)
    except Exception:  # what is damaged or hostile may fail anywhere; the caller then names the record
        return {}
    return found


def _is_inert(value: Any) -> bool:
    return isinstance(value, _Inert) or (isinstance(value, type) and issubclass(value, _Inert))


def _storage_keys(value: Any) -> Iterator[str]:
    """The records that a tensor, or what a pickle has made of one, was built from."""
    seen: set[int] = set()  # a pickle can nest a few objects in each other more often than anybody can count
    stack = [value]
    while stack:
        part = stack.pop()
        if isinstance(part, _Storage):
            yield part.key
        elif isinstance(part, _Inert) and id(part) not in seen:
            seen.add(id(part))
            stack.extend(part._given)


def _walk(tree: Any) -> Iterator[tuple[str, Any]]:
    """Everything in `tree` with its key path, containers before what they hold."""
    seen: set[int] = set()
    stack = [("", tree)]
    while stack:
        path, value = stack.pop()
        yield path, value
        if _is_inert(value) or not isinstance(value, (dict, list, tuple, set)) or id(value) in seen:
            continue
        seen.add(id(value))
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        stack.extend((f"{path}.{key}" if path else str(key), item) for key, item in reversed(items))
