"""``index.json``: what is known of the checkpoints of a directory, beside them, so that no file need be opened.

It is told of each commit and removal. It is derived: a checkpoint is there whether the index knows of it or not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from milepost.errors import CheckpointFormatError
from milepost.storage import local

NAME = "index.json"
_VERSION = 1

Record = dict[str, Any]
"""One checkpoint: ``path`` (relative to the directory), ``kind`` (ranked, last or exception), ``step``, ``epoch``,
``metrics``, ``monitor``, ``score``, ``time`` (seconds since 1970) and ``size_bytes`` (None where the plugin stores it
elsewhere). A number that is not finite is None."""


def read_index(directory: str | Path) -> list[Record]:
    """The records of the checkpoints in `directory`, the oldest first, those whose file is gone left out.

    Raises:
        CheckpointFormatError: the file is there and is no index of this version.
    """
    place = Path(directory)
    try:
        content = json.loads((place / NAME).read_bytes())
        version, records = content["version"], list(content["checkpoints"])
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointFormatError(
            f"{place / NAME} is no index of checkpoints ({error}). Delete it: the next save begins a new one"
        ) from error
    if version != _VERSION:
        raise CheckpointFormatError(f"{place / NAME} is of version {version!r}; this Milepost reads {_VERSION}")
    return [record for record in records if record["size_bytes"] is None or (place / record["path"]).exists()]


def update_index(directory: str | Path, *, put: Sequence[Record], drop: Iterable[str]) -> None:
    """Replace the records of the paths in `put`, take out those of `drop`, and write the index atomically.

    Records of others in the directory stay. An index that cannot be read is begun anew.

    Raises:
        CheckpointSaveError: it could not be written; what was there before is intact.
    """
    place = Path(directory)
    try:
        known = read_index(place)
    except CheckpointFormatError:
        known = []
    gone = {*drop, *(record["path"] for record in put)}
    added = [{**_finite(record), "size_bytes": _size(place / record["path"])} for record in put]
    records = sorted([r for r in known if r["path"] not in gone] + added, key=lambda r: (r["step"], r["time"]))
    content = json.dumps({"version": _VERSION, "checkpoints": records}, indent=1, allow_nan=False)
    with local.replacing(place / NAME) as file:
        file.write(content.encode() + b"\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _size(path: Path) -> int | None:
    if path.is_dir():
        return sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
    return path.stat().st_size if path.exists() else None
