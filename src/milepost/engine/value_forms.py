"""The exact form, as plain data, of values that torch's safe loader does not know; and how they are made again.

A form is ``{"type": tag, "value": data}``, with the ``"class"`` it belongs to where there is one. `decode` is given
what anybody may have written; whatever it raises beside `Unresolved` means that it is no form.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import pathlib
import re
import types
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import torch

from milepost.engine import omegaconf_form
from milepost.engine.value_classes import Unresolved, class_of, fill, is_written_in_python, name_of, state_of

Form = dict[str, Any]

_SCALARS = frozenset((type(None), bool, int, float, str, bytes))
_PLAIN = _SCALARS | {bytearray, complex, torch.Size, torch.dtype, torch.device, torch.layout}
_FACTORIES = {f.__name__: f for f in (int, float, str, bool, list, dict, set, tuple, bytes, complex, OrderedDict)}
_DTYPE = re.compile(r"[<>|][biufcmMSU]\d{1,9}(\[\d{0,9}[a-zA-Zμ]{1,2}\])?")
_UNDER_WAY = object()


class _Leaf(NamedTuple):
    """A value without parts: its data, the value of such data, and the plain value for other readers."""

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    near: Callable[[Any], Any] = str


def _moment(value: Any) -> Any:
    return [value.isoformat(), value.fold] if type(value.tzinfo) in (type(None), timezone) else None


_LEAVES: dict[type, _Leaf] = {
    datetime: _Leaf(_moment, lambda data: datetime.fromisoformat(data[0]).replace(fold=data[1])),
    time: _Leaf(_moment, lambda data: time.fromisoformat(data[0]).replace(fold=data[1])),
    date: _Leaf(date.isoformat, date.fromisoformat),
    timedelta: _Leaf(lambda v: [v.days, v.seconds, v.microseconds], lambda data: timedelta(*data)),
    Decimal: _Leaf(str, lambda data: Decimal(_text(data))),
    Fraction: _Leaf(lambda v: [v.numerator, v.denominator], lambda data: Fraction(*map(_integer, data))),
    UUID: _Leaf(str, UUID),
    range: _Leaf(lambda v: [v.start, v.stop, v.step], lambda data: range(*data)),
    **{
        kind: _Leaf(str, lambda data, kind=kind: kind(_text(data)))  # type: ignore[misc]
        for kind in {pathlib.PurePosixPath, pathlib.PureWindowsPath, type(pathlib.Path())}
    },
}
_LEAF_TAGS = {kind.__name__: leaf for kind, leaf in _LEAVES.items()}
_LEAF_TAGS.setdefault("PosixPath", _LEAVES[pathlib.PurePosixPath])  # a path of the other system is kept as a pure one
_LEAF_TAGS.setdefault("WindowsPath", _LEAVES[pathlib.PureWindowsPath])


def is_plain(value: Any) -> bool:
    """Whether torch's safe loader gives `value` back as it is: scalars, tensors, and tuples and sets of such."""
    kind = type(value)
    if kind in _PLAIN:
        return True
    if isinstance(value, torch.Tensor):
        return kind in (torch.Tensor, torch.nn.Parameter) or kind.__module__.partition(".")[0] == "torch"
    try:
        return kind in (tuple, set) and all(map(is_plain, value))
    except RecursionError:
        return False


def is_plain_key(key: Any) -> bool:
    """Whether `key` is found again in a dict that was loaded; a NaN is not, and a tensor is compared by identity."""
    if type(key) is tuple:
        return all(map(is_plain_key, key))
    return type(key) in _SCALARS and key == key


def encode(value: Any) -> Form | None:
    """The exact form of `value`, or None where it has none or contains itself."""
    try:
        return _encode(value)
    except RecursionError:
        return None


def _encode(value: Any) -> Form | None:
    kind = type(value)
    if is_plain(value):
        return {"type": "plain", "value": value}
    if (leaf := _LEAVES.get(kind)) is not None:
        return _form(kind.__name__, leaf.encode(value))
    if isinstance(value, enum.Enum):
        return _encode_enum(value)
    if isinstance(value, np.generic) and _DTYPE.fullmatch(value.dtype.str):
        return {"type": "numpy_scalar", "dtype": value.dtype.str, "value": value.tobytes()}
    if kind is np.ndarray and _DTYPE.fullmatch(value.dtype.str):
        return {"type": "numpy", "dtype": value.dtype.str, "shape": list(value.shape), "value": _bytes_of(value)}
    if isinstance(value, np.dtype):
        return _form("numpy_dtype", value.str if _DTYPE.fullmatch(value.str) and value.names is None else None)
    if kind in (list, tuple, set, frozenset):
        return _form(kind.__name__, _encode_all(value))
    if kind is slice:
        return _form("slice", _encode_all((value.start, value.stop, value.step)))
    if isinstance(value, tuple):
        fields = getattr(kind, "_fields", None)
        return _form("namedtuple", _encode_all(value), kind) if fields is not None else None
    if isinstance(value, dict):
        return _encode_dict(value)
    if kind is argparse.Namespace or kind is types.SimpleNamespace:
        return _form(kind.__name__, _encode_pairs(vars(value)))
    if dataclasses.is_dataclass(value):
        return _encode_dataclass(value)
    if omegaconf_form.is_config(value):
        return _form("omegaconf", _encode(omegaconf_form.contents(value)), flags=omegaconf_form.flags(value))
    return None


def nearest(value: Any) -> Any:
    """The plain value that a reader without Milepost gets for a `value` that has a form."""
    kind = type(value)
    if is_plain(value):
        return value
    if (leaf := _LEAVES.get(kind)) is not None:
        return leaf.near(value)
    if isinstance(value, enum.Enum):
        return nearest(value.value) if encode(value.value) is not None else value.name
    if isinstance(value, np.generic):
        item = value.item()
        return item if type(item) in _PLAIN else str(value) if value.dtype.kind in "mM" else float(value)
    if kind is np.ndarray:
        return _nearest_array(value)
    if isinstance(value, dict):
        return {(k if is_plain_key(k) else str(nearest(k))): nearest(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(map(nearest, value))
    if isinstance(value, (list, set, frozenset)):
        return [nearest(item) for item in value]
    if isinstance(value, (np.dtype, slice)):
        return str(value)
    if omegaconf_form.is_config(value):
        return nearest(omegaconf_form.contents(value))
    return {name: nearest(item) for name, item in state_of(value).items()}  # a dataclass or namespace


def decode(form: Form, made: dict[int, Any] | None = None) -> Any:
    """Make the value of `form` again.

    Raises:
        Unresolved: a class that it names is not there. Any other exception: `form` is none.
    """
    made = {} if made is None else made
    if id(form) in made:  # what is shared is made once, or a few kilobytes could ask for more than any memory
        if made[id(form)] is _UNDER_WAY:
            raise ValueError("a form that contains itself")
        return made[id(form)]
    made[id(form)] = _UNDER_WAY
    made[id(form)] = value = _decode(form["type"], form["value"], form, lambda part: decode(part, made))
    return value


def _decode(tag: str, data: Any, form: Form, part: Callable[[Form], Any]) -> Any:
    if tag == "plain":
        return data
    if (leaf := _LEAF_TAGS.get(tag)) is not None:
        return leaf.decode(data)
    if tag == "enum":
        return _make_enum(form, data)
    if tag == "numpy_scalar":
        return np.ndarray((), _dtype(form["dtype"]), data)[()]
    if tag == "numpy":
        kind, shape = _dtype(form["dtype"]), form["shape"]
        if kind.itemsize == 0 and 0 not in shape:  # no bytes bound how many there are, and NumPy's copy gives each one
            raise ValueError(f"an array of {kind.str} of the shape {shape}")
        return np.ndarray(shape, kind, data.numpy().tobytes()).copy()
    if tag == "numpy_dtype":
        return _dtype(data)
    if (container := {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}.get(tag)) is not None:
        return container(part(item) for item in data)
    if tag == "slice":
        return slice(*(part(item) for item in data))
    if tag == "namedtuple":
        return _make_namedtuple(form, [part(item) for item in data])
    if tag == "dataclass":
        return _make_object(class_of(_text(form["class"])), {_text(name): part(item) for name, item in data})
    if tag == "omegaconf":
        return omegaconf_form.make(part(data), form["flags"])
    pairs = [(part(key), part(item)) for key, item in data]
    if tag == "dict":
        return dict(pairs) if "class" not in form else _make_dict(form, pairs, part)
    if tag == "defaultdict":
        return defaultdict(None if form["factory"] is None else _FACTORIES[form["factory"]], pairs)
    namespace = {"Namespace": argparse.Namespace, "SimpleNamespace": types.SimpleNamespace}[tag]()
    vars(namespace).update({_text(name): item for name, item in pairs})
    return namespace


# ---- parts -------------------------------------------------------------------------------------------------------


def _form(tag: str, data: Any, cls: type | None = None, **more: Any) -> Form | None:
    if data is None:
        return None
    return {"type": tag, "value": data, **({} if cls is None else {"class": name_of(cls)}), **more}


def _encode_all(values: Iterable[Any]) -> list[Form] | None:
    forms = []
    for value in values:
        if (form := _encode(value)) is None:
            return None
        forms.append(form)
    return forms


def _encode_pairs(mapping: dict[Any, Any]) -> list[list[Form]] | None:
    keys, values = _encode_all(mapping), _encode_all(mapping.values())
    return None if keys is None or values is None else [list(pair) for pair in zip(keys, values, strict=True)]


def parts(value: Any) -> Iterable[tuple[Any, Any]]:
    """What a value of a kind that has a form is made of, with the name of each part; nothing for any other kind."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return enumerate(value)
    if isinstance(value, dict):
        return value.items()
    made_of_attributes = dataclasses.is_dataclass(value) or type(value) in (argparse.Namespace, types.SimpleNamespace)
    return state_of(value).items() if made_of_attributes else ()


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no integer")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"{value!r} is no text")
    return value


# ---- enums and arrays --------------------------------------------------------------------------------------------


def _encode_enum(value: enum.Enum) -> Form | None:
    names: list[Any] = [value.name]
    if isinstance(value, enum.Flag) and value.name not in type(value).__members__:  # several flags at once, or none
        names = [member.name for member in value]
        if functools.reduce(lambda a, b: a | b, (m.value for m in value), 0) != value.value:
            return None
    return _form("enum", names, type(value))


def _make_enum(form: Form, names: list[str]) -> Any:
    cls = class_of(_text(form["class"]))
    known = cls.__members__ if issubclass(cls, enum.Enum) else {}
    if missing := [name for name in names if name not in known]:
        raise Unresolved(f"{form['class']}.{missing[0]}")
    if len(names) == 1:
        return known[names[0]]
    if not known or not issubclass(cls, enum.Flag):
        raise Unresolved(form["class"])
    some: Any = next(iter(known.values()))
    return functools.reduce(lambda a, b: a | b, (known[name] for name in names), some & ~some)


def _dtype(name: str) -> np.dtype[Any]:
    if not _DTYPE.fullmatch(name):  # NumPy's own parser takes much more than the name of a type
        raise ValueError(f"{name!r} is no dtype of numbers or text")
    return np.dtype(name)


def _bytes_of(array: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8) if array.nbytes else torch.empty(0).byte()


def share_bytes(form: Form, near: Any) -> None:
    """Let the form of an array use the memory of the tensor that stands in its place: it is stored once."""
    if form["type"] == "numpy" and isinstance(near, torch.Tensor) and near.numel():
        form["value"] = near.reshape(-1)  # of the same dtype: torch refuses to save one memory as two


def _nearest_array(array: np.ndarray[Any, Any]) -> Any:
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except (TypeError, ValueError):  # torch lacks the dtype or byte order; the save must not fail for it
        plain = array.astype(array.dtype.newbyteorder("=")) if array.dtype.kind in "iuf" else array.astype(str)
        return plain.astype(np.float64).tolist() if plain.dtype.kind == "f" else plain.tolist()


# ---- classes by name ---------------------------------------------------------------------------------------------


def _make_namedtuple(form: Form, items: list[Any]) -> Any:
    cls = class_of(_text(form["class"]))
    if not issubclass(cls, tuple) or len(getattr(cls, "_fields", ())) != len(items):
        raise Unresolved(form["class"])
    return tuple.__new__(cls, items)


def _encode_dict(value: dict[Any, Any]) -> Form | None:
    kind, pairs = type(value), _encode_pairs(value)
    if kind is dict:
        return _form("dict", pairs)
    if kind is defaultdict:
        factory: Any = value.default_factory  # type: ignore[attr-defined]
        if factory is not None and _FACTORIES.get(getattr(factory, "__name__", "")) is not factory:
            return None
        return _form("defaultdict", pairs, factory=None if factory is None else factory.__name__)
    if not is_written_in_python(kind, (dict, OrderedDict, Counter)):
        return None
    attributes = _encode_pairs(getattr(value, "__dict__", {}))
    return None if attributes is None else _form("dict", pairs, kind, attributes=attributes)


def _make_dict(form: Form, pairs: list[tuple[Any, Any]], part: Callable[[Form], Any]) -> Any:
    cls = class_of(_text(form["class"]))
    if not issubclass(cls, dict) or not is_written_in_python(cls, (dict, OrderedDict, Counter)):
        raise Unresolved(form["class"])
    base: Any = OrderedDict if issubclass(cls, OrderedDict) else dict  # not what cls makes of these methods
    made = base.__new__(cls)
    for key, item in pairs:
        base.__setitem__(made, key, item)
    return fill(made, {_text(part(key)): part(item) for key, item in form["attributes"]})


def _encode_dataclass(value: Any) -> Form | None:
    if not is_written_in_python(type(value), (object,)):
        return None
    state = state_of(value)
    forms = _encode_all(state.values())
    pairs = None if forms is None else [[name, form] for name, form in zip(state, forms, strict=True)]
    return _form("dataclass", pairs, type(value))


def _make_object(cls: type, state: dict[str, Any]) -> Any:
    if not dataclasses.is_dataclass(cls) or not is_written_in_python(cls, (object,)):
        raise Unresolved(name_of(cls))
    return fill(object.__new__(cls), state)
