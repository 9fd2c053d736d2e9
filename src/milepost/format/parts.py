"""A tensor that is stored in parts, put together from the rows that it consists of, and checked.

Pure: no I/O, no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from milepost.errors import CheckpointFormatError
from milepost.format.boxes import Box, fault
from milepost.format.codec import PartsRef, TensorRef
from milepost.format.manifest import Index


@dataclass(frozen=True, slots=True)
class PartedTensor:
    """A whole tensor, and where its parts are.

    Attributes:
        name: of the whole one, in its group.
        dtype: as the format names it.
        stored_as: torch's type where the format has none for it and the parts' bytes are stored as U8, else None.
        shape: of the whole.
        parts: where each part is stored, and which box of the whole it is.
    """

    name: str
    dtype: str
    stored_as: str | None
    shape: tuple[int, ...]
    parts: tuple[tuple[TensorRef, Box], ...]


def parted(ref: PartsRef, index: Callable[[int], Index], path: str) -> PartedTensor:
    """Put a tensor together; no byte of it is read.

    Args:
        index: gives the index of a blob by its number, or raises CheckpointFormatError where there is none.

    Raises:
        CheckpointFormatError: the parts are of different tensors, overlap, or leave a gap.
    """
    kinds: set[tuple[str, str, str | None, tuple[int, ...]]] = set()
    parts: list[tuple[TensorRef, Box]] = []
    for place in ref.refs():
        found = index(place.blob)
        if place.row >= len(found.names):
            raise CheckpointFormatError(
                f"{path}: the tree refers to the tensor in row {place.row} of blob {place.blob}."
            )
        box = found.box(place.row)
        if box is None:
            raise CheckpointFormatError(f"{path}: the tree takes {found.names[place.row]!r} for a part of a tensor.")
        name, sizes, _ = found.boxes[str(place.row)]
        other = found.stored_as.get(str(place.row))
        kinds.add((name, found.dtypes[place.row], None if other is None else other[0], tuple(sizes)))
        parts.append((place, box))
    if len(kinds) != 1:
        what = sorted(f"{name!r} ({other or dtype}, {list(shape)})" for name, dtype, other, shape in kinds)
        raise CheckpointFormatError(f"{path}: the tree takes parts of {' and '.join(what[:3])} for one tensor.")
    (name, dtype, stored_as, shape), *_ = kinds
    if wrong := fault(shape, [box for _, box in parts]):
        raise CheckpointFormatError(f"{path}: the parts of {name!r} do not fill its shape {list(shape)}: {wrong}.")
    return PartedTensor(name, dtype, stored_as, shape, tuple(parts))
