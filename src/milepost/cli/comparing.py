"""What differs between two checkpoints, and by how much. Numbers are read with NumPy."""

from __future__ import annotations

from typing import Any

from milepost.cli.reading import Opened, Tensor

_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U64": "<u8",
    "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "<u1", "C64": "<c8", "complex128": "<c16",
}  # fmt: skip

Change = dict[str, Any]


def compare(one: Opened, other: Opened) -> list[Change]:
    """The differences, by key path: ``kind`` is added, removed, type, values or changed.

    A changed tensor has ``largest`` (the largest absolute difference), ``relative`` (the norm of the difference over
    that of the first) and ``differing`` (how many elements differ), where its type has numbers.
    """
    changes: list[Change] = []
    for name in sorted(set(one.tensors) | set(other.tensors)):
        a, b = one.tensors.get(name), other.tensors.get(name)
        if a is None or b is None:
            changes.append({"name": name, "kind": "added" if a is None else "removed"})
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            changes.append({"name": name, "kind": "type", "from": _type(a), "to": _type(b)})
    both = [name for name in one.tensors if name in other.tensors]
    common = [name for name in both if _type(one.tensors[name]) == _type(other.tensors[name])]
    for name in common:
        change = _difference(one.tensors[name], other.tensors[name])
        if change is not None:
            changes.append({"name": name, "kind": "changed", **change})
    for name in sorted(set(one.values) | set(other.values)):
        first, second = one.values.get(name), other.values.get(name)
        if first != second:
            changes.append({"name": name, "kind": "values", "from": first, "to": second})
    return changes


def _type(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _difference(one: Tensor, other: Tensor) -> Change | None:
    a, b = one.read(), other.read()
    if a == b:
        return None
    numbers = _numbers(one.dtype, a), _numbers(other.dtype, b)
    if numbers[0] is None or numbers[1] is None:
        return {"largest": None, "relative": None, "differing": None}
    import numpy

    first, second = numbers
    with numpy.errstate(all="ignore"):
        delta = numpy.abs(second - first)
        norm = float(numpy.linalg.norm(first))
        return {
            "largest": float(delta.max()),
            "relative": float(numpy.linalg.norm(delta)) / norm if norm else None,
            "differing": int(numpy.count_nonzero(first != second)),
        }


def _numbers(dtype: str, data: bytes) -> Any:
    import numpy

    if dtype == "BF16":
        return (numpy.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype("f8")
    if dtype not in _NUMPY:
        return None
    found = numpy.frombuffer(data, _NUMPY[dtype])
    return found.astype("c16" if dtype in ("C64", "complex128") else "f8")
