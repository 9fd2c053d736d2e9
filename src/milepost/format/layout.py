"""Where the bytes of a blob lie: a plain safetensors file, cut into pieces of 1 MiB that have a digest each.

Pure: no I/O, no torch. Offsets are from the start of the file, ranges half-open, sizes in bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

PIECE_BYTES = 1 << 20
HEADER_ALIGN_BYTES = 64
"""Tensor data starts at a multiple of this, so that a reader that maps the file gets aligned tensors."""

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Size of one element for each type name that safetensors has and this format uses."""


class TensorEntry(NamedTuple):
    """One tensor in a blob. (A named tuple: there may be a million of them.)

    Attributes:
        name: unique in its blob.
        dtype: a key of `ITEM_BYTES`.
        shape: as stored; elements lie in C order.
        start: where its first byte lies in the file.
        stop: where its last byte has been.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class BlobLayout:
    """A whole blob: its header as bytes, and its tensors in the order in which they lie behind it, without gaps."""

    header: bytes
    entries: tuple[TensorEntry, ...]
    size: int


def lay_out(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> BlobLayout:
    """Lay out tensors given as (name, dtype, shape), in this order but for alignment: wide elements come first.

    safetensors allows no gap between tensors, so each is aligned to its elements only if wider elements stand before
    narrower ones. The sort is stable.
    """
    order = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor[1]])
    sizes = [ITEM_BYTES[dtype] * math.prod(shape) for _, dtype, shape in order]
    stops = list(accumulate(sizes))
    fields = [
        f'{_quoted(name)}:{{"dtype":"{dtype}","shape":{list(shape)},"data_offsets":[{stop - size},{stop}]}}'
        for (name, dtype, shape), size, stop in zip(order, sizes, stops, strict=True)
    ]
    if metadata:
        fields.insert(0, f'"__metadata__":{json.dumps(dict(metadata))}')
    text = ("{" + ",".join(fields) + "}").encode()
    text += b" " * (-(8 + len(text)) % HEADER_ALIGN_BYTES)
    header = len(text).to_bytes(8, "little") + text
    base = len(header)
    entries = tuple(
        TensorEntry(name, dtype, shape, base + stop - size, base + stop)
        for (name, dtype, shape), size, stop in zip(order, sizes, stops, strict=True)
    )
    return BlobLayout(header, entries, entries[-1].stop if entries else base)


_quoted = json.encoder.encode_basestring_ascii


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """The pieces of a file of `size` bytes, as ranges."""
    for start in range(0, size, PIECE_BYTES):
        yield start, min(start + PIECE_BYTES, size)


def piece_count(size: int) -> int:
    return -(-size // PIECE_BYTES)


def pieces_of(start: int, stop: int) -> range:
    """Numbers of the pieces that a range touches."""
    return range(start // PIECE_BYTES, -(-stop // PIECE_BYTES)) if stop > start else range(0)
