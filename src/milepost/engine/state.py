"""From a nested state to a tree and its tensors, and back."""

from __future__ import annotations

import math
import pickle
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Mapping
from functools import cached_property
from typing import Any

import torch

from milepost._distributed import OfAllRanks, PerRank
from milepost.engine import value_classes, value_forms
from milepost.engine.requests import Leaf, unique
from milepost.engine.spread import Sharded, Spreads, is_dtensor, local_tensor
from milepost.errors import CheckpointFormatError, UnencodableValueError, UnsafeCheckpointError
from milepost.format.boxes import Box
from milepost.format.codec import MAX_DEPTH, PartsRef, RanksRef, Tagged, TensorRef
from milepost.format.manifest import Index

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
TORCH_TYPES = {name: dtype for dtype, name in DTYPES.items()}
_OTHERS = {str(d): d for d in (torch.complex128, torch.complex32, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)}

Rows = Callable[[int], tuple[int, int] | PartsRef]
"""From the number of a leaf to its blob and its row there, or to those of its parts."""


Path = tuple[Any, str]
"""The place of a value: the `Path` of what holds it, None at the top, and its key. A link is cheaper than a text."""


class Flattened:
    """A state as a tree whose tensors are numbered leaves. Tied tensors are one leaf.

    Args:
        pickled: what becomes of a value that cannot be data. None: an error. Else called with its key path, and the
            value is pickled: it is loaded only by a caller who asks for that.
        ranks: whether several ranks save together. Else a `PerRank` value stands for what is in it, and a DTensor has
            to be all here.

    Attributes:
        tensors: of each leaf, what its bytes are taken from; of one that several ranks have parts of, this rank's.
        own_paths: key paths of the values that are this rank's own, in the order in which the tree counts them.
    """

    def __init__(
        self, state: Mapping[str, Any], pickled: Callable[[str, Any], None] | None = None, *, ranks: bool = False
    ) -> None:
        self._pickled = pickled
        self._ranks = ranks
        self._spreads = Spreads()
        self._sharded: dict[int, Sharded] = {}  # by place
        self._own: set[int] = set()  # places inside of values that are this rank's own
        self._inside = False
        self._own_values: list[Any] = []
        self.own_paths: list[str] = []
        self._found: list[torch.Tensor] = []  # kept, so that no storage is freed, and its address used again
        self._paths: list[Path] = []
        self._tree = {key: self._walk(value, (None, str(key)), 0) for key, value in state.items()}
        self._numbers, self._first = _tied(self._found, self._sharded, self._own)
        self.tensors = [_storable(self._found[place]) for place in self._first]

    @property
    def structure(self) -> Any:
        """All that the leaves and their plans depend on: equal for two states that differ in values and addresses."""
        tensors = [(t.dtype, t.shape, t.stride()) for t in self._found]
        spreads = {n: found[:2] for n, found in self._sharded.items()}
        return self._paths, tensors, self._numbers, spreads, self._own, self.own_paths

    @cached_property
    def leaves(self) -> list[Leaf]:
        """The leaves in the order in which they were found. Naming them takes longer than finding them."""
        taken: dict[str, set[str]] = {}
        own_names: dict[str, set[str]] = {}  # apart: the others' names must be the same on all ranks
        found = []
        for number, place in enumerate(self._first):
            group, name = _names(self._paths[place])
            names = taken.setdefault(group, set()) if place not in self._own else own_names.setdefault(group, set())
            found.append(_leaf(number, self._found[place], group, unique(name, names)))
        return found

    @property
    def sharded(self) -> dict[int, Sharded]:
        """By leaf, what several ranks have parts of."""
        return {self._numbers[place]: found for place, found in self._sharded.items()}

    @property
    def own(self) -> set[int]:
        """The leaves in values that are this rank's own."""
        return {self._numbers[place] for place in self._own}

    def narrowed(self, leaf: int, box: Box) -> torch.Tensor:
        """A box of a leaf, as its bytes are taken; in this rank's part, where several have parts of it."""
        tensor = self._found[self._first[leaf]]
        for dimension, (start, length) in enumerate(zip(box.offsets, box.shape, strict=True)):
            tensor = tensor.narrow(dimension, start, length)
        return _storable(tensor)

    def own_tree(self, place: Rows) -> list[Any]:
        """The values that are this rank's own, as `tree` gives the others."""
        return [_placed(value, lambda found: place(self._numbers[found])) for value in self._own_values]

    def tree(self, place: Rows) -> Any:
        """The tree as the codec takes it, with each leaf where `place` says it is stored."""
        return _placed(self._tree, lambda found: place(self._numbers[found]))

    def _walk(self, value: Any, path: Path, depth: int) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if depth >= MAX_DEPTH:
            raise UnencodableValueError(
                f"The state is nested deeper than {MAX_DEPTH} levels at {_dotted(path)}.", key_path=_dotted(path)
            )
        if kind in (dict, OrderedDict):
            return kind(
                [
                    (k, v if type(v) in _PLAIN else self._walk(v, (path, k if type(k) is str else str(k)), depth + 1))
                    for k, v in value.items()
                ]
            )
        if kind in (list, tuple):
            return kind(
                [v if type(v) in _PLAIN else self._walk(v, (path, str(n)), depth + 1) for n, v in enumerate(value)]
            )
        if kind is PerRank:
            return self._own_value(value.value, path, depth)
        encoded = _form_of(value)
        if encoded is None:
            where = _dotted(path)
            if self._pickled is not None:
                self._pickled(where, value)
                return Tagged({"type": "pickle", "value": pickle.dumps(value), "path": where})
            raise UnencodableValueError(
                f"The value at {where!r} is a {kind.__module__}.{kind.__qualname__}, which cannot be stored as data."
                " Store plain values, tensors, paths, enums or dataclasses in its place.",
                key_path=where,
            )
        return Tagged(self._walk(encoded, path, depth + 1))

    def _tensor(self, tensor: torch.Tensor, path: Path) -> _Found:
        place = len(self._found)
        if is_dtensor(tensor):
            sharded = self._spreads.of(tensor, _dotted(path))  # type: ignore[arg-type]
            if not self._ranks and len(sharded.spread.ranks) > 1:
                raise UnencodableValueError(
                    f"The tensor at {_dotted(path)} is a DTensor over {len(sharded.spread.ranks)} ranks, and one rank"
                    " saves alone. Let all of them save together (ranks=...), or gather it first.",
                    key_path=_dotted(path),
                )
            if self._ranks and not self._inside:
                self._sharded[place] = sharded
            tensor = local_tensor(tensor)  # type: ignore[arg-type]
        if self._inside:
            self._own.add(place)
        self._found.append(_checked(tensor, path))
        self._paths.append(path)
        return _Found(place)

    def _own_value(self, value: Any, path: Path, depth: int) -> Any:
        if not self._ranks or self._inside:
            return self._walk(value, path, depth)
        self.own_paths.append(_dotted(path))
        self._inside = True
        try:
            self._own_values.append(self._walk(value, path, depth))
        finally:
            self._inside = False
        return RanksRef(len(self._own_values) - 1)


_PLAIN = frozenset((str, bool, int, float, bytes, type(None)))


def _names(path: Path) -> tuple[str, str]:
    """Group and name of a tensor. One that is itself at the top is of the group ""."""
    keys = []
    at: Any = path
    while at is not None:
        at, key = at
        keys.append(key)
    group = keys.pop() if len(keys) > 1 else ""
    name = ""
    for key in reversed(keys):
        name = f"{name}.{key}" if name else key
    return group, name


def _dotted(path: Path) -> str:
    group, name = _names(path)
    return f"{group}.{name}" if group else name


def _checked(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    """The tensor as its memory shows it, if it can be stored."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise UnencodableValueError(
            f"The tensor at {_dotted(path)} is {'on the meta device' if tensor.is_meta else tensor.layout}, which"
            " cannot be stored. Give it memory, or store its dense parts.",
            key_path=_dotted(path),
        )
    if tensor.dtype not in DTYPES and str(tensor.dtype) not in _OTHERS:
        raise UnencodableValueError(
            f"The tensor at {_dotted(path)} has the type {tensor.dtype}, which cannot be stored.",
            key_path=_dotted(path),
        )
    return tensor.resolve_conj().resolve_neg() if tensor.is_neg() or tensor.is_conj() else tensor


def _tied(
    tensors: list[torch.Tensor], sharded: Mapping[int, Sharded], own: Container[int]
) -> tuple[list[int], list[int]]:
    """The leaf of each tensor that was found, and where each leaf was found first."""
    addresses = [tensor.data_ptr() for tensor in tensors]  # 0: no elements
    if len(set(addresses)) == len(addresses):
        return list(range(len(tensors))), list(range(len(tensors)))
    seen: dict[Any, int] = {}
    numbers: list[int] = []
    first: list[int] = []
    for place, (address, tensor) in enumerate(zip(addresses, tensors, strict=True)):
        identity: Any = (address, tensor.dtype, tensor.shape, tensor.stride(), tensor.device, place in own)
        if place in sharded:  # all ranks must see the same ties, whether they hold elements of it or not
            identity = (sharded[place], tensor.dtype, tensor.storage_offset())
        elif not address:
            identity = place
        number = seen.setdefault(identity, len(first))
        numbers.append(number)
        if number == len(first):
            first.append(place)
    return numbers, first


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype in DTYPES else tensor.contiguous().reshape(-1).view(torch.uint8)


def _leaf(number: int, tensor: torch.Tensor, group: str, name: str) -> Leaf:
    shape, stride = tuple(tensor.shape), None
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        size = tensor.numel() * tensor.element_size()
        return Leaf(number, group, name, "U8", (size,), None, (str(tensor.dtype), shape))
    if not tensor.is_contiguous() and _dense(tensor):
        stride = tuple(tensor.stride())
    return Leaf(number, group, name, dtype, shape, stride)


def torch_type(tensor: torch.Tensor, leaf: Leaf) -> tuple[str, int]:
    """The type of a leaf in torch's words, and the bytes of an element; `tensor` is what its bytes are taken from."""
    if leaf.stored_as is None:
        return str(tensor.dtype), tensor.element_size()
    return leaf.stored_as[0], _OTHERS[leaf.stored_as[0]].itemsize


def own_values(tree: Any, rank_tree: Callable[[int], list[Any]], rank: int | None, world_size: int) -> Any:
    """A decoded tree with the values put in that are each rank's own: those of `rank`, or of all where it is None.

    Args:
        rank_tree: the values of one rank, as a list.
        world_size: of the run that saved.
    """
    trees = {n: rank_tree(n) for n in (range(world_size) if rank is None else (rank,))}

    def of(number: int, which: int) -> Any:
        if number >= len(trees[which]):
            raise CheckpointFormatError(f"The tree refers to value {number} of {len(trees[which])} of rank {which}.")
        return trees[which][number]

    def put_in(value: Any) -> Any:
        kind = type(value)
        if kind is RanksRef:
            if rank is not None:
                return of(value.number, rank)
            return OfAllRanks(tuple(of(value.number, n) for n in trees))
        if kind in (dict, OrderedDict):
            return kind((k, put_in(v)) for k, v in value.items())
        if kind in (list, tuple):
            return kind(put_in(v) for v in value)
        return Tagged(put_in(value.data)) if kind is Tagged else value

    return put_in(tree)


def rebuild(tree: Any, tensor: Callable[[Any], torch.Tensor], unpickle: bool = False) -> Any:
    """The nested state from a decoded tree; `tensor` gives the tensor for a reference, the same one for the same.

    Args:
        unpickle: whether to load pickled values, which runs code of the file.

    Raises:
        UnsafeCheckpointError: there is a pickled value and `unpickle` is False.
    """
    if isinstance(tree, (TensorRef, PartsRef)):
        return tensor(tree)
    if isinstance(tree, RanksRef):
        raise CheckpointFormatError(f"The tree refers to {tree}, but no rank has stored values of its own.")
    kind = type(tree)
    if kind is OfAllRanks:
        return OfAllRanks(tuple(rebuild(v, tensor, unpickle) for v in tree.values))
    if kind in (dict, OrderedDict):
        return kind((k, rebuild(v, tensor, unpickle)) for k, v in tree.items())
    if kind in (list, tuple):
        return kind(rebuild(v, tensor, unpickle) for v in tree)
    if kind is Tagged:
        return _value_of(rebuild(tree.data, tensor, unpickle), unpickle)
    return tree


_FORMS: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    complex: ("complex", lambda v: [v.real, v.imag], lambda d: complex(*d)),
    bytearray: ("bytearray", bytes, lambda d: bytearray(_of_bytes(d))),
    set: ("set", list, set),
    frozenset: ("frozenset", list, frozenset),
    Counter: ("counter", dict, Counter),
    torch.Size: ("torch.Size", list, torch.Size),
    torch.dtype: ("torch.dtype", lambda v: str(v).removeprefix("torch."), lambda d: _of_torch(d, torch.dtype)),
    torch.layout: ("torch.layout", lambda v: str(v).removeprefix("torch."), lambda d: _of_torch(d, torch.layout)),
    torch.device: ("torch.device", str, torch.device),
}
"""Types that torch's pickles take as they are, so that the forms of values have nothing for them."""

_DECODERS = {tag: decode for tag, _, decode in _FORMS.values()}


def _form_of(value: Any) -> Any:
    known = _FORMS.get(type(value))
    if known is not None:
        return {"type": known[0], "value": known[1](value)}
    return value_forms.encode(value)


def _value_of(form: Any, unpickle: bool) -> Any:
    """The value of a form. Nothing is imported for a file's sake: a class that is not there leaves the form.

    Raises:
        CheckpointFormatError: it is none.
        UnsafeCheckpointError: it is a pickle, and `unpickle` is False.
    """
    if isinstance(form, dict) and form.get("type") == "pickle":
        if not unpickle:
            raise UnsafeCheckpointError(
                f"The value at {form.get('path')!r} is pickled, and loading it would run code. If you trust the"
                " checkpoint, load it with weights_only=False.",
                key_path=str(form.get("path")),
            )
        return pickle.loads(form["value"])
    try:
        known = _DECODERS.get(form["type"])
        return known(form["value"]) if known is not None else value_forms.decode(form)
    except value_classes.Unresolved as missing:
        warnings.warn(
            f"{missing.args[0]} is not there, so its fields stand in its place. Import the module that defines it"
            " before loading; classes are never imported for a file's sake.",
            UserWarning,
            stacklevel=2,
        )
        return form
    except Exception as error:  # the file may be anybody's: all that is wrong with it ends here
        raise CheckpointFormatError(f"The tree holds a malformed value: {type(error).__name__}: {error}") from error


def _of_torch(name: str, kind: type) -> Any:
    found = vars(torch).get(name)  # getattr would import what torch imports only when it is asked for
    if not isinstance(found, kind):
        raise ValueError(f"torch has no {kind.__name__} {name!r}")
    return found


def _of_bytes(data: Any) -> bytes:
    if not isinstance(data, bytes):  # a number would be taken for a size, and memory got
        raise TypeError(f"{type(data).__name__} instead of bytes")
    return data


def references(tree: Any) -> list[TensorRef | PartsRef]:
    """All references to tensors in a decoded tree, each once."""
    found: dict[TensorRef | PartsRef, None] = {}

    def visit(value: Any) -> None:
        if isinstance(value, (TensorRef, PartsRef)):
            found[value] = None
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif isinstance(value, Tagged):
            visit(value.data)
        elif isinstance(value, OfAllRanks):
            visit(value.values)

    visit(tree)
    return list(found)


def stored_type(index: Index, row: int) -> tuple[torch.dtype, tuple[int, ...]]:
    """Type and shape of the tensor in a row.

    Raises:
        CheckpointFormatError: an unknown type, or one whose size does not fit the stored bytes.
    """
    if row >= len(index.names):
        raise CheckpointFormatError(f"The tree refers to the tensor in row {row} of {len(index.names)}.")
    other = index.stored_as.get(str(row)) if index.stored_as else None
    if other is None:
        return TORCH_TYPES[index.dtypes[row]], tuple(index.shapes[row])
    entry = index.entry(row)
    kind, shape = _OTHERS.get(other[0]), tuple(other[1])
    if (
        kind is None
        or any(n < 0 for n in shape)
        or entry.dtype != "U8"
        or kind.itemsize * math.prod(shape) != entry.size
    ):
        raise CheckpointFormatError(f"{entry.name} is stored as type {other[0]!r} with the shape {other[1]}.")
    return kind, shape


class _Found(int):
    """Stands in the tree for the tensor found as the nth, until it is known where that is stored."""


def _placed(value: Any, place: Rows) -> Any:
    kind = type(value)
    if kind is _Found:
        found = place(value)
        return found if type(found) is PartsRef else TensorRef(*found)
    if kind in (dict, OrderedDict):
        return kind((k, _placed(v, place)) for k, v in value.items())
    if kind in (list, tuple):
        return kind(_placed(v, place) for v in value)
    if kind is Tagged:
        return Tagged(_placed(value.data, place))
    return value


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap, in some order of the dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True
