"""Values as data: what is no plain value is stored as the nearest one in place, and exactly under ``milepost``."""

from __future__ import annotations

import base64
import dataclasses
import enum
import pickle
import sys
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from milepost.errors import UnencodableValueError

KEY = "milepost"  # the one top-level key for all that Lightning lacks; the exact values stand under "values" in it
_PLAIN = (type(None), bool, int, float, str, bytes, torch.Tensor, torch.Size, torch.dtype, torch.device)
Encoded = dict[str, Any]


def to_plain(checkpoint: dict[str, Any], *, warn: bool = True) -> dict[str, Any]:
    """Return a copy of the containers of `checkpoint` with every value plain, and the exact forms under `KEY`.

    A value that cannot be data is pickled, with a warning unless `warn` is False: the checkpoint is written all the
    same, and loads only with ``weights_only=False``.
    """
    exact: list[dict[str, Any]] = []
    plain = _plain(checkpoint, (), exact, _pickled_loudly if warn else _pickled)
    if exact:
        plain[KEY] = {**plain.get(KEY, {}), "values": exact}
    return plain  # type: ignore[no-any-return]


def check(value: Any, *, remedy: str = "") -> None:
    """Raise UnencodableValueError for the first value below `value` that cannot be stored as data."""

    def refuse(value: Any, path: tuple[Any, ...]) -> Any:
        where = ".".join(map(str, path))
        raise UnencodableValueError(
            f"The value at {where!r} is a {_type_name(value)}, which cannot be stored as data. Store plain values,"
            " tensors, paths, enums or dataclasses in its place; leave it out of the hyper-parameters with"
            f" save_hyperparameters(ignore=[...]).{remedy}",
            key_path=where,
        )

    _plain(value, (), [], refuse)


def from_plain(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Put the exact values back into what was loaded, in place."""
    ours = checkpoint.get(KEY)
    if not isinstance(ours, dict):
        return checkpoint
    values = ours.pop("values", ())
    if not ours:
        del checkpoint[KEY]
    for item in values:
        path = item["path"]
        try:
            value = _decode(item["value"])
        except LookupError as error:
            warnings.warn(
                f"{'.'.join(map(str, path))}: {error.args[0]} is not imported, so the plain value stands in its place."
                " Import the module that defines it before loading.",
                UserWarning,
                stacklevel=2,
            )
            continue
        parent: Any = checkpoint
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = value
    return checkpoint


def _plain(
    value: Any, path: tuple[Any, ...], exact: list[dict[str, Any]], fallback: Callable[[Any, tuple[Any, ...]], Any]
) -> Any:
    kind = type(value)
    if kind in _PLAIN or isinstance(value, torch.Tensor):
        return value
    if kind is list:
        return [_plain(v, (*path, i), exact, fallback) for i, v in enumerate(value)]
    if isinstance(value, dict) and all(type(k) in (str, int, float, bool, type(None)) for k in value):
        rebuilt = {k: _plain(v, (*path, k), exact, fallback) for k, v in value.items()}
        if hasattr(value, "_metadata"):  # a state dict's versions: torch.save keeps them on an OrderedDict only
            return value if all(isinstance(v, torch.Tensor) for v in value.values()) else rebuilt
        return rebuilt
    encoded = _encode(value)
    if encoded is None:
        return fallback(value, path)
    near = _nearest(value)
    if encoded["type"] != "plain":
        exact.append({"path": list(path), "value": encoded})
    return near


def _pickled(value: Any, path: tuple[Any, ...]) -> Any:
    pickle.dumps(value)  # what cannot even be pickled fails here, with its own message
    return value


def _pickled_loudly(value: Any, path: tuple[Any, ...]) -> Any:
    _pickled(value, path)
    where = ".".join(map(str, path))
    warnings.warn(
        f"The value at {where!r} is a {_type_name(value)}, which cannot be stored as data. The checkpoint is written"
        " with it pickled, and loads only with weights_only=False. Store plain values instead.",
        UserWarning,
        stacklevel=2,
    )
    return value


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _nearest(value: Any) -> Any:
    """The plain value that a reader without Milepost gets."""
    if isinstance(value, enum.Enum):
        return _nearest(value.value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(np.array(value))
        except (TypeError, ValueError):  # torch lacks the dtype or byte order; the save must not fail for it
            return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _nearest(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {
            str(_nearest(k)) if not isinstance(k, (str, int, float, bool)) else k: _nearest(v) for k, v in value.items()
        }
    if isinstance(value, tuple):
        return tuple(_nearest(v) for v in value)
    if isinstance(value, (list, set, frozenset)):
        return [_nearest(v) for v in value]
    if isinstance(value, (complex, datetime, timedelta, range, slice)):
        return str(value)
    return value


def _encode(value: Any) -> Encoded | None:
    """The exact form, as tagged plain data; None where there is none."""
    kind = type(value)
    if kind in _PLAIN or isinstance(value, torch.Tensor):
        return {"type": "plain", "value": value}
    if isinstance(value, enum.Enum):
        return {"type": "enum", "class": _name_of(kind), "name": value.name}
    if isinstance(value, PurePath):
        return {"type": "path", "value": str(value)}
    if isinstance(value, np.generic) and value.dtype.kind in "biufcSU":
        return {"type": "numpy_scalar", "dtype": value.dtype.str, "value": base64.b64encode(value.tobytes()).decode()}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"type": "numpy", "dtype": value.dtype.str, "shape": list(value.shape), "value": data}
    if isinstance(value, complex):
        return {"type": "complex", "value": [value.real, value.imag]}
    if isinstance(value, datetime):
        return {"type": "datetime", "value": value.isoformat()}
    if isinstance(value, timedelta):
        return {"type": "timedelta", "value": [value.days, value.seconds, value.microseconds]}
    if isinstance(value, range):
        return {"type": "range", "value": [value.start, value.stop, value.step]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return None if None in fields.values() else {"type": "dataclass", "class": _name_of(kind), "fields": fields}
    if kind in (list, tuple, set, frozenset):
        items = [_encode(v) for v in value]
        if None in items:
            return None
        if kind is tuple and all(i is not None and i["type"] == "plain" for i in items):
            return {"type": "plain", "value": value}
        return {"type": kind.__name__, "items": items}
    if isinstance(value, Mapping):
        pairs = [[_encode(k), _encode(v)] for k, v in value.items()]
        return None if any(None in pair for pair in pairs) else {"type": "dict", "items": pairs}
    return None


def _decode(encoded: Encoded) -> Any:
    kind = encoded["type"]
    if kind == "plain":
        return encoded["value"]
    if kind == "enum":
        return _class_of(encoded["class"], enum.Enum)[encoded["name"]]
    if kind == "path":
        return Path(encoded["value"])
    if kind == "numpy_scalar":
        return np.frombuffer(base64.b64decode(encoded["value"]), dtype=_dtype(encoded["dtype"]))[0]
    if kind == "numpy":
        flat = np.frombuffer(base64.b64decode(encoded["value"]), dtype=_dtype(encoded["dtype"]))
        return flat.reshape(encoded["shape"]).copy()
    if kind == "complex":
        return complex(*encoded["value"])
    if kind == "datetime":
        return datetime.fromisoformat(encoded["value"])
    if kind == "timedelta":
        return timedelta(*encoded["value"])
    if kind == "range":
        return range(*encoded["value"])
    if kind == "dataclass":
        cls = _class_of(encoded["class"], object)
        if not dataclasses.is_dataclass(cls):
            raise LookupError(encoded["class"])
        made: Any = object.__new__(cls)  # type: ignore[arg-type]  # fields are set, no code of the class runs
        for name, value in encoded["fields"].items():
            object.__setattr__(made, name, _decode(value))
        return made
    if kind == "dict":
        return {_decode(k): _decode(v) for k, v in encoded["items"]}
    containers: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    return containers[kind](_decode(v) for v in encoded["items"])


def _dtype(name: str) -> np.dtype[Any]:
    dtype = np.dtype(name)
    if dtype.hasobject:
        raise LookupError(name)
    return dtype


def _name_of(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _class_of(name: str, base: type) -> Any:
    """A class by name, out of modules that the program itself has imported: nothing is imported for a file's sake."""
    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or not issubclass(found, base):
        raise LookupError(name)
    return found
