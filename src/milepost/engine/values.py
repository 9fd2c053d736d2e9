"""Values as data: what is no plain value is stored as the nearest one in place, and exactly under ``milepost``."""

from __future__ import annotations

import pickle
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

from milepost.engine import value_forms
from milepost.engine.value_classes import Unresolved
from milepost.engine.value_forms import is_plain, is_plain_key
from milepost.errors import CheckpointFormatError, UnencodableValueError

KEY = "milepost"  # the one top-level key for all that Lightning lacks; the exact values stand under "values" in it
_DEEPEST = 100
KeyPath = tuple[Any, ...]
Fallback = Callable[[Any, KeyPath], Any]


def to_plain(checkpoint: dict[str, Any], *, warn: bool = True) -> dict[str, Any]:
    """Return a copy of the containers of `checkpoint` with every value plain, and the exact forms under `KEY`.

    A value that cannot be data is pickled, with a warning unless `warn` is False: the checkpoint is written all the
    same, and loads only with ``weights_only=False``.
    """
    exact: list[dict[str, Any]] = []
    plain = _plain(checkpoint, (), exact, _pickled_loudly if warn else _pickled)
    if exact:
        ours = plain.get(KEY, {})
        plain[KEY] = {**ours, "values": [*ours.get("values", ()), *exact]}
    return plain  # type: ignore[no-any-return]


def check(value: Any, *, remedy: str = "") -> None:
    """Raise UnencodableValueError for the first value below `value` that cannot be stored as data."""

    def refuse(value: Any, path: KeyPath) -> Any:
        value, path = _innermost(value, path)
        where = _dotted(path)
        raise UnencodableValueError(
            f"The value at {where!r} is a {_type_name(value)}, which cannot be stored as data{_too_deep(path)}. Store"
            f" plain values, tensors, paths, enums or dataclasses in its place{_or_leave_it_out(path)}.{remedy}",
            key_path=where,
        )

    _plain(value, (), [], refuse)


def _or_leave_it_out(path: KeyPath) -> str:
    if not path or path[0] in ("hyper_parameters", "datamodule_hyper_parameters"):
        return "; leave it out of the hyper-parameters with save_hyperparameters(ignore=[...])"
    return "; leave it out of what the hook or state_dict gives"


def from_plain(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Put the exact values back into what was loaded, in place. No code that the file names runs.

    Raises:
        CheckpointFormatError: what stands under ``milepost.values`` is not what `to_plain` writes.
    """
    ours = checkpoint.get(KEY)
    if not isinstance(ours, dict) or "values" not in ours:
        return checkpoint
    items = ours.pop("values")
    if not ours:
        del checkpoint[KEY]
    if not isinstance(items, list):
        raise _malformed("values", f"a {type(items).__name__}, not a list")
    made: dict[int, Any] = {}
    for number, item in enumerate(items):
        try:
            parent, key, form = _place(checkpoint, item["path"]), item["path"][-1], item["value"]
            value = value_forms.decode(form, made)
        except Unresolved as missing:
            warnings.warn(
                f"{_dotted(item['path'])}: {missing.args[0]} is not there, so the plain value stands in its place."
                " Import the module that defines it before loading; classes are never imported for a file's sake.",
                UserWarning,
                stacklevel=2,
            )
            continue
        except Exception as error:  # the file may be anybody's: all that is wrong with it ends here
            raise _malformed(f"values.{number}", f"{type(error).__name__}: {error}") from error
        parent[key] = value
    return checkpoint


def _place(checkpoint: dict[str, Any], path: list[Any]) -> dict[Any, Any] | list[Any]:
    """The container of what `path` names: a dict or list that holds something under the last key."""
    place: Any = checkpoint
    for number, key in enumerate(path):
        if type(place) not in (dict, OrderedDict, Counter, list) or (type(place) is list and type(key) is not int):
            raise TypeError(f"{key!r} of {_dotted(path)} is no key of a {type(place).__name__}")
        found = place[key]
        if number < len(path) - 1:
            place = found
    return place  # type: ignore[no-any-return]


def _malformed(where: str, what: str) -> CheckpointFormatError:
    return CheckpointFormatError(
        f"The exact values in the checkpoint are not what Milepost writes: {KEY}.{where}: {what}. Whoever wrote the"
        " file edited them; load it with torch.load to see what it holds."
    )


def _plain(value: Any, path: KeyPath, exact: list[dict[str, Any]], fallback: Fallback) -> Any:
    if len(path) > _DEEPEST:
        return fallback(value, path)
    if is_plain(value):
        return value
    kind = type(value)
    if kind is list:
        return [_plain(v, (*path, i), exact, fallback) for i, v in enumerate(value)]
    if kind in (dict, OrderedDict, Counter) and all(map(is_plain_key, value)):
        made: Any = kind()
        for key, item in value.items():
            made[key] = _plain(item, (*path, key), exact, fallback)
        if hasattr(value, "_metadata"):  # a state dict's versions, which loading reads
            made._metadata = value._metadata
        return made
    if (form := value_forms.encode(value)) is None:
        return fallback(value, path)
    near = value_forms.nearest(value)
    value_forms.share_bytes(form, near)
    exact.append({"path": list(path), "value": form})
    return near


def _innermost(value: Any, path: KeyPath) -> tuple[Any, KeyPath]:
    """The value within `value` for which the whole cannot be stored."""
    for key, item in value_forms.parts(value) if len(path) <= _DEEPEST else ():
        if value_forms.encode(item) is None:
            return _innermost(item, (*path, key))
    return value, path


def _pickled(value: Any, path: KeyPath) -> Any:
    pickle.dumps(value)  # what cannot even be pickled fails here, with its own message
    return value


def _pickled_loudly(value: Any, path: KeyPath) -> Any:
    _pickled(value, path)
    warnings.warn(
        f"The value at {_dotted(path)!r} is a {_type_name(value)}, which cannot be stored as data{_too_deep(path)}. The"
        " checkpoint is written with it pickled, and loads only with weights_only=False. Store plain values instead.",
        UserWarning,
        stacklevel=2,
    )
    return value


def _dotted(path: Any) -> str:
    return ".".join(map(str, path))


def _too_deep(path: KeyPath) -> str:
    return f" more than {_DEEPEST} levels deep" if len(path) > _DEEPEST else ""


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
