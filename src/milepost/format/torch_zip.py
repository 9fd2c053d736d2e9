"""What is in torch's zip file, read without torch and without running the code its pickle names."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from typing import IO, Any


class _Inert:
    """Stands for anything a pickle names that is not plain. Building it runs nothing."""

    _name = ""
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
    """A tensor's memory, by the name of its record: ``data/<key>``."""

    def __init__(self, key: str) -> None:
        self.key = key


_PLAIN = {("collections", "OrderedDict"): OrderedDict}  # no dict: state_dict() hangs _metadata on it


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[(module, name)]
        harmless = module == "torch" or module.startswith(("torch._utils", "torch.storage"))
        return type("Inert", (_Inert,), {"_name": "" if harmless else f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return _Storage(str(pid[2])) if isinstance(pid, tuple) and len(pid) > 2 else None


def _tree(archive: zipfile.ZipFile) -> Any:
    name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
    return _InertUnpickler(io.BytesIO(archive.read(name))).load()


def refused_value(file: IO[bytes]) -> tuple[str, str] | None:
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
    if isinstance(value, _Storage):
        yield value.key
    elif isinstance(value, _Inert):
        for part in value._given:
            yield from _storage_keys(part)


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
