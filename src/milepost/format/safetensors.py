"""The header of a safetensors file, read without trust. Pure: no torch."""

from __future__ import annotations

import json
from typing import IO, Any, NamedTuple

_HEADER_MAX_BYTES = 100 << 20


class Header(NamedTuple):
    """What a file says of itself.

    Attributes:
        base: where the tensors begin in the file.
        metadata: text by name.
        tensors: by name, as they stand in the header; nothing of them is checked yet.
    """

    base: int
    metadata: dict[str, str]
    tensors: dict[str, Any]


def read_header(file: IO[bytes], size: int) -> Header:
    """Read the header of the file of `size` bytes; no more memory is taken than it has.

    Raises:
        ValueError, TypeError, RecursionError: it is no safetensors file.
    """
    if size < 8:
        raise ValueError(f"it has {size} bytes")
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _HEADER_MAX_BYTES):
        raise ValueError(f"its header would have {length} bytes")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no dict")
    metadata = {str(k): str(v) for k, v in dict(header.pop("__metadata__", {})).items()}
    return Header(8 + length, metadata, header)
