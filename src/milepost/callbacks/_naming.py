"""File names of checkpoints, from a template and the metrics at hand."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from milepost.errors import MisconfigurationException

_FIELD = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")


def fill(
    template: str,
    metrics: Mapping[str, Any],
    *,
    insert_names: bool,
    equals: str = "=",
    prefix: str = "",
    join: str = "-",
) -> str:
    """`template` with each ``{key}`` or ``{key:format}`` replaced by the value, after ``key=`` with `insert_names`.

    A "/" in a metric's name becomes "_": a name never makes a directory; one that the template itself has does.

    Raises:
        MisconfigurationException: a key that is not in `metrics`, or a format that does not fit its value.
    """

    def one(match: re.Match[str]) -> str:
        key, spec = match.group(1), match.group(2) or ""
        if key not in metrics:
            raise MisconfigurationException(
                f"the checkpoint filename {template!r} names {key!r}, which has not been logged. Available: "
                f"{', '.join(sorted(metrics))}. Log it before the save, or take it out of the filename"
            )
        value = metrics[key]
        plain = value.item() if hasattr(value, "item") else value
        try:
            text = format(plain, spec)
        except (ValueError, TypeError) as error:
            raise MisconfigurationException(
                f"the checkpoint filename {template!r} asks for {key!r} as {spec!r}, which does not fit its value "
                f"{plain!r} ({error}). Use a format for {type(plain).__name__}"
            ) from error
        return f"{key.replace('/', '_')}{equals}{text}" if insert_names else text

    filled = _FIELD.sub(one, template)
    return f"{prefix}{join}{filled}" if prefix else filled


def unused(path: str, version: Callable[[int], str], taken: Callable[[str], bool], first: int) -> str:
    """`path`, or the first of ``version(first)``, ``version(first + 1)``, … that is not taken."""
    number = first
    while taken(path):
        path = version(number)
        number += 1
    return path


def absolute(dirpath: str | os.PathLike[str] | None) -> str | None:
    """A local directory with "~" and links resolved; a URL as it is."""
    if dirpath is None:
        return None
    text = os.fspath(dirpath)
    return text if "://" in text else os.path.realpath(Path(text).expanduser())


def default_dirpath(trainer: Any) -> str:
    """``checkpoints`` under the logger's directory, or under ``default_root_dir`` where there is no logger."""
    root = trainer.log_dir if trainer.loggers else None
    return str(absolute(Path(root or trainer.default_root_dir) / "checkpoints"))


def relative(path: str, dirpath: str) -> str | None:
    """`path` relative to `dirpath`, or None where it lies outside."""
    if not path or not dirpath or "://" in dirpath:
        return None
    # The directory is resolved, the file is not: a link that lies in the directory belongs to it.
    place = Path(os.path.realpath(Path(path).parent)) / Path(path).name
    base = Path(os.path.realpath(dirpath))
    return str(place.relative_to(base)) if place.is_relative_to(base) else None
