"""What ``milepost ls`` and ``prune`` know of a checkpoint: out of heads and indexes, no tensor is looked at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from milepost.cli.reading import find, form_of, size_of
from milepost.errors import CheckpointError

Row = dict[str, Any]


def listed(directory: Path) -> list[Row]:
    """The checkpoints in `directory` by step and time. A damaged one is listed too, with its error."""
    rows = [_row(path) for path in find(directory)]
    known = _recorded(directory)
    for row in rows:
        record = known.get(Path(row["path"]).name)
        if record is not None:
            metrics, epoch = record
            row["metrics"] = row["metrics"] or metrics
            row["epoch"] = epoch if row["epoch"] is None else row["epoch"]
    return sorted(rows, key=lambda row: (-1 if row["step"] is None else row["step"], row["time"], row["path"]))


def _row(path: Path) -> Row:
    row: Row = {
        "path": str(path), "form": form_of(path), "step": None, "epoch": None, "time": path.stat().st_mtime,
        "size_bytes": size_of(path), "metrics": {}, "error": None,
    }  # fmt: skip
    try:
        row |= _READ.get(str(row["form"]), _nothing)(path)
    except (CheckpointError, OSError) as error:
        row["error"] = str(error)
    return row


def _directory(path: Path) -> Row:
    from milepost.format import manifest

    head = manifest.decode_head(_start(path / manifest.HEAD_NAME, manifest.HEAD_MAX_BYTES), str(path))
    return {"step": head.step, "time": head.time, "metrics": manifest.metrics_as_numbers(head.metrics)}


def _start(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        return file.read(limit + 1)


def _torch_file(path: Path) -> Row:
    from milepost.format import torch_zip

    with path.open("rb") as file:
        content = torch_zip.contents(file)
    top = content if isinstance(content, dict) else {}
    return {
        name: found if isinstance(found := top.get(key), int) else None
        for name, key in (("step", "global_step"), ("epoch", "epoch"))
    }


def _distcp(path: Path) -> Row:
    """What Lightning keeps beside a sharded checkpoint; DCP itself says nothing without a look at its values."""
    from milepost.format.distcp import LIGHTNING_NAME

    return _torch_file(path / LIGHTNING_NAME) if (path / LIGHTNING_NAME).is_file() else {}


def _nothing(path: Path) -> Row:
    return {}


_READ: dict[str, Callable[[Path], Row]] = {"directory": _directory, "ckpt": _torch_file, "dcp": _distcp}


def _recorded(directory: Path) -> dict[str, tuple[dict[str, float], int | None]]:
    """Metrics and epoch by file name, out of the ``index.json`` that `ModelCheckpoint` keeps.

    A ``.ckpt`` holds no metrics, and the head of a directory no epoch.
    """
    import json

    try:
        records = json.loads((directory / "index.json").read_bytes())["checkpoints"]
        return {str(record["path"]): (_numbers(record["metrics"]), _whole(record.get("epoch"))) for record in records}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _numbers(metrics: Any) -> dict[str, float]:
    return {str(k): float(v) for k, v in metrics.items() if isinstance(v, (int, float))}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None
