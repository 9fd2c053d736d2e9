"""JSON for trees of values, exact: what JSON cannot say stands under a tag, ``{"$": tag, "v": …}``.

Pure: no I/O, no torch. The tags are listed in docs/format.md. -0.0 and integers of any length are JSON already.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from milepost.errors import CheckpointFormatError
from milepost.format.manifest import refuse_twins

MAX_DEPTH = 64
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+\\?(?:"|\Z)|[\[\]{}]', re.DOTALL)  # linear, whatever the bytes are
_SPECIAL = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


class TensorRef(NamedTuple):
    """A leaf: the tensor in row `row` of the blob number `blob`."""

    blob: int
    row: int


class PartsRef(NamedTuple):
    """A leaf: a tensor that is cut into parts. Their rows say which box of it each one is."""

    blobs: tuple[int, ...]
    rows: tuple[int, ...]

    def refs(self) -> list[TensorRef]:
        """Where each part is."""
        return list(map(TensorRef, self.blobs, self.rows))


@dataclass(frozen=True, slots=True)
class RanksRef:
    """A leaf: a value that is each rank's own, number `number` in the list that the rank's tree is."""

    number: int


@dataclass(frozen=True, slots=True)
class Tagged:
    """A value of a type of its own, as plain data that the engine turns back."""

    data: Any


def encode(tree: Any) -> bytes:
    """Encode what consists of plain scalars, bytes, list, tuple, dict, OrderedDict, and the leaves above."""
    return json.dumps(_to_json(tree), separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def decode(data: bytes, path: str) -> Any:
    """The reverse of `encode`.

    Raises:
        CheckpointFormatError: no JSON, an unknown tag, a duplicate key, or nested deeper than `MAX_DEPTH`.
    """
    if _depth(data) > 4 * MAX_DEPTH:
        raise CheckpointFormatError(f"{path} is nested deeper than {MAX_DEPTH} levels.")
    try:
        return _from_json(
            json.loads(data.decode(), object_pairs_hook=refuse_twins, parse_constant=_no_constant), path, 0
        )
    except CheckpointFormatError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, binascii.Error) as error:
        raise CheckpointFormatError(f"{path} is no tree of values: {error}.") from error


def renumbered(tree: Any, numbers: Sequence[int]) -> Any:
    """A decoded tree whose references are to the blobs of these numbers: a rank's own tree counts only its blobs.

    Raises:
        IndexError: it refers to more.
    """
    kind = type(tree)
    if kind is TensorRef:
        return TensorRef(numbers[tree.blob], tree.row)
    if kind is PartsRef:
        return PartsRef(tuple(numbers[blob] for blob in tree.blobs), tree.rows)
    if kind in (dict, OrderedDict):
        return kind((key, renumbered(value, numbers)) for key, value in tree.items())
    if kind in (list, tuple):
        return kind(renumbered(value, numbers) for value in tree)
    return Tagged(renumbered(tree.data, numbers)) if kind is Tagged else tree


def _to_json(value: Any) -> Any:
    kind = type(value)
    if kind in (str, bool, int, type(None)):
        return value
    if kind is float:
        return value if value - value == 0 else {"$": "float", "v": repr(value)}
    if kind is list:
        return [_to_json(v) for v in value]
    if kind in (dict, OrderedDict) and len(value) > 1 and all(map(_is_named_tensor, value.items())):
        return _columns(value)
    if kind is dict:
        if all(type(k) is str for k in value) and "$" not in value:
            return {k: _to_json(v) for k, v in value.items()}
        return {"$": "dict", "v": [[_to_json(k), _to_json(v)] for k, v in value.items()]}
    if kind is OrderedDict:
        return {"$": "ordered", "v": [[_to_json(k), _to_json(v)] for k, v in value.items()]}
    if kind is TensorRef:
        return {"$": "tensor", "v": [value.blob, value.row]}
    if kind is PartsRef:
        return {"$": "parts", "v": [list(value.blobs), _rows(value)]}
    if kind is RanksRef:
        return {"$": "ranks", "v": value.number}
    if kind is tuple:
        return {"$": "tuple", "v": [_to_json(v) for v in value]}
    if kind is bytes:
        return {"$": "bytes", "v": base64.b64encode(value).decode()}
    if kind is Tagged:
        return {"$": "value", "v": _to_json(value.data)}
    raise TypeError(f"{kind.__module__}.{kind.__qualname__} is not plain data")


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return type(item[1]) in (TensorRef, PartsRef) and type(item[0]) is str


def _columns(tensors: dict[str, TensorRef | PartsRef]) -> Any:
    """A dict of tensors, as state dicts are, by columns: a node for each would cost more than the tensors' bytes."""
    kind = "dict" if type(tensors) is dict else "ordered"
    if any(type(ref) is PartsRef for ref in tensors.values()):
        return {"$": "parted", "v": [kind, list(tensors), *_parted_columns(list(tensors.values()))]}
    blobs = [ref[0] for ref in tensors.values()]
    shared = blobs[0] if len(set(blobs)) == 1 else blobs
    return {"$": "tensors", "v": [kind, list(tensors), shared, [ref[1] for ref in tensors.values()]]}


def _parted_columns(refs: list[TensorRef | PartsRef]) -> list[Any]:
    """The sets of blobs that tensors are in, each once; by tensor the number of its set; by tensor its rows.

    Most tensors of a state are cut over the same ranks, and stand in the same row of each one's blob.
    """
    sets: dict[Any, int] = {}
    numbers = [sets.setdefault(ref[0], len(sets)) for ref in refs]
    listed = [list(blobs) if isinstance(blobs, tuple) else blobs for blobs in sets]
    return [listed, numbers, [_rows(ref) if isinstance(ref, PartsRef) else ref.row for ref in refs]]


def _rows(ref: PartsRef) -> int | list[int]:
    """One number where it is the same row in each blob."""
    return ref.rows[0] if len(set(ref.rows)) == 1 else list(ref.rows)


def _from_columns(data: Any) -> dict[str, TensorRef]:
    kind, names, blobs, rows = data
    blobs = blobs if isinstance(blobs, list) else [blobs] * len(names)
    if any(type(number) is not int or number < 0 for number in (*blobs, *rows)):
        raise ValueError("numbers of tensors that are none")
    return _named(kind, names, list(map(TensorRef, blobs, rows)))


def _from_parted(data: Any) -> dict[str, TensorRef | PartsRef]:
    kind, names, sets, numbers, rows = data
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("numbers of sets that are none")
    refs: list[TensorRef | PartsRef] = []
    for number, row in zip(numbers, rows, strict=True):
        blobs = sets[number]
        refs.append(_parts_reference([blobs, row]) if isinstance(blobs, list) else _reference([blobs, row]))
    return _named(kind, names, refs)


def _named(kind: Any, names: Any, refs: list[Any]) -> dict[str, Any]:
    if any(type(name) is not str for name in names) or len(set(names)) != len(names):
        raise ValueError("names that are no text, or one twice")
    return {"dict": dict, "ordered": OrderedDict}[kind](zip(names, refs, strict=True))


def _from_json(value: Any, path: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise CheckpointFormatError(f"{path} is nested deeper than {MAX_DEPTH} levels.")
    if isinstance(value, list):
        return [_from_json(v, path, depth + 1) for v in value]
    if not isinstance(value, dict):
        return value
    if "$" not in value:
        return {k: _from_json(v, path, depth + 1) for k, v in value.items()}
    if set(value) != {"$", "v"}:
        raise CheckpointFormatError(f"{path} holds a tag with the keys {sorted(value)}.")
    tag, inner = value["$"], value["v"]
    if tag == "float":
        return _SPECIAL[inner]
    if tag == "tuple":
        return tuple(_from_json(v, path, depth + 1) for v in inner)
    if tag == "dict":
        return _from_pairs(inner, path, depth + 1)
    if tag == "ordered":
        return OrderedDict(_from_pairs(inner, path, depth + 1))
    if tag == "bytes":
        return base64.b64decode(inner, validate=True)
    if tag == "tensor":
        return _reference(inner)
    if tag == "tensors":
        return _from_columns(inner)
    if tag == "parts":
        return _parts_reference(inner)
    if tag == "parted":
        return _from_parted(inner)
    if tag == "ranks":
        return RanksRef(_number(inner))
    if tag == "value":
        return Tagged(_from_json(inner, path, depth + 1))
    raise CheckpointFormatError(f"{path} holds the unknown tag {tag!r}.")


def _from_pairs(pairs: Any, path: str, depth: int) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for key_data, item in pairs:
        key = _from_json(key_data, path, depth)
        if key in made:
            raise CheckpointFormatError(f"{path} holds the key {key!r} twice.")
        made[key] = _from_json(item, path, depth)
    return made


def _number(data: Any) -> int:
    if type(data) is not int or data < 0:
        raise ValueError(f"{data!r} instead of a number")
    return data


def _reference(data: Any) -> TensorRef:
    blob, row = data
    return TensorRef(_number(blob), _number(row))


def _parts_reference(data: Any) -> PartsRef:
    blobs, rows = data
    if not isinstance(blobs, list) or not blobs:
        raise ValueError("a tensor of no parts")
    rows = rows if isinstance(rows, list) else [rows] * len(blobs)
    pairs = [(_number(blob), _number(row)) for blob, row in zip(blobs, rows, strict=True)]
    if len(set(pairs)) != len(pairs):
        raise ValueError("a part that stands twice")
    return PartsRef(*(tuple(column) for column in zip(*pairs, strict=True)))


def _no_constant(name: str) -> Any:
    raise ValueError(f"the constant {name}")


def _depth(data: bytes) -> int:
    """How deep brackets are nested, found before a decoder recurses into them."""
    depth = deepest = 0
    for match in _TOKEN.finditer(data):
        token = data[match.start() : match.start() + 1]
        depth += 1 if token in b"[{" else -1 if token in b"]}" else 0
        deepest = max(deepest, depth)
    return deepest
