"""From the Trainer's arguments to a checked, resolved configuration. Pure: touches no device and no file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from milepost.errors import MisconfigurationException


@dataclass(frozen=True)
class Limits:
    """When training ends. `max_epochs` is None or -1 for no end by epochs, `max_steps` -1 for no end by steps."""

    max_epochs: int | None
    min_epochs: int | None
    max_steps: int
    min_steps: int | None
    max_time: timedelta | None


def resolve_limits(
    *,
    max_epochs: int | None,
    min_epochs: int | None,
    max_steps: int,
    min_steps: int | None,
    max_time: Any,
    fast_dev_run: int,
) -> Limits:
    """Apply the defaults: 1,000 epochs where nothing else ends the run."""
    counts = {"max_epochs": max_epochs, "min_epochs": min_epochs, "max_steps": max_steps, "min_steps": min_steps}
    for name, value in counts.items():
        if value is not None and not isinstance(value, (int, float)):
            raise MisconfigurationException(f"{name}={value!r}: give a number, or leave it out.")
    if max_epochs is not None and max_epochs < -1:
        raise MisconfigurationException(f"max_epochs={max_epochs} must be a non-negative integer or -1 (no limit).")
    if max_steps < -1:
        raise MisconfigurationException(f"max_steps={max_steps} must be a non-negative integer or -1 (no limit).")
    if fast_dev_run:
        return Limits(1, None, fast_dev_run, None, None)
    limit = parse_duration(max_time, "max_time")
    if max_epochs is None and max_steps == -1 and limit is None:
        max_epochs = 1000
    if max_epochs is None:
        max_epochs = -1
    if min_epochs is None and min_steps is not None:
        min_epochs = 1
    return Limits(max_epochs, min_epochs, max_steps, min_steps, limit)


def parse_duration(value: Any, name: str) -> timedelta | None:
    """A timedelta, a mapping of its arguments, or text ``DD:HH:MM:SS``."""
    if value is None or isinstance(value, timedelta):
        return value
    if isinstance(value, Mapping):
        return timedelta(**value)
    if isinstance(value, str):
        parts = value.split(":")
        if len(parts) == 4 and all(part.isdigit() for part in parts):
            days, hours, minutes, seconds = map(int, parts)
            return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    raise MisconfigurationException(f"{name}={value!r}: give a timedelta, a dict of its arguments, or 'DD:HH:MM:SS'.")


def batch_limit(value: int | float | None, name: str, fast_dev_run: int) -> int | float:
    """Check a ``limit_*_batches`` argument: an int counts batches, a float is a fraction of them."""
    if fast_dev_run:
        return fast_dev_run
    if value is None:
        return 1.0
    if isinstance(value, float) and value > 1.0 and value.is_integer():
        return int(value)
    if (isinstance(value, int) and value >= 0) or (isinstance(value, float) and 0.0 <= value <= 1.0):
        return value
    raise MisconfigurationException(
        f"{name}={value!r}: give a number of batches (int ≥ 0) or a fraction of them (float from 0.0 to 1.0)."
    )


def sanity_steps(value: int | None) -> int:
    """Validation batches before training: 2 unless another number is given, -1 for all."""
    if value is None:
        return 2
    if isinstance(value, (int, float)) and value >= -1:
        return value
    raise MisconfigurationException(f"num_sanity_val_steps={value!r}: give a number of batches, or -1 for all of them.")


def dev_batches(fast_dev_run: int | bool) -> int:
    """Batches of each loop under ``fast_dev_run``; 0 where it is off."""
    if not isinstance(fast_dev_run, int) or fast_dev_run < 0:
        raise MisconfigurationException(f"fast_dev_run={fast_dev_run!r}: give True, or a number of batches (int ≥ 0).")
    return int(fast_dev_run)


def not_negative(value: int, name: str) -> int:
    if not isinstance(value, int) or value < 0:
        raise MisconfigurationException(f"{name}={value!r} must be an int of at least 0.")
    return value


def positive(value: int, name: str) -> int:
    if not isinstance(value, int) or value < 1:
        raise MisconfigurationException(f"{name}={value!r} must be an int of at least 1.")
    return value


def root_dir(value: str | os.PathLike[str] | None) -> str:
    """Where logs and checkpoints go: the current directory by default."""
    return str(Path.cwd()) if value is None else str(Path(value).expanduser())


def refuse(argument: str, value: Any, remedy: str) -> MisconfigurationException:
    """The error for an argument of Lightning's Trainer that is not to be had here."""
    return MisconfigurationException(f"Trainer({argument}={value!r}) is not supported: {remedy}")
