"""What the arguments of a checkpointer mean, and which of them contradict each other. Pure."""

from __future__ import annotations

from typing import Any

from milepost.engine.retention import KeepBest, Retention, Rule
from milepost.errors import MisconfigurationException


def resolve_retention(monitor: str | None, save_top_k: int, mode: str, rule: Rule | None) -> Retention:
    """The policy of ``ModelCheckpoint(monitor, save_top_k, mode, retention=rule)``.

    Raises:
        MisconfigurationException: a value is out of range, there is nothing to rank by, or both say what to keep.
    """
    if save_top_k < -1:
        raise MisconfigurationException(f"save_top_k={save_top_k} must be -1 (all), 0 (none) or positive")
    if monitor is None and save_top_k not in (-1, 0, 1):
        raise MisconfigurationException(
            f"save_top_k={save_top_k} needs something to rank by: pass monitor, or save_top_k of -1, 0 or 1"
        )
    if mode not in ("min", "max"):
        raise MisconfigurationException(f"mode={mode!r} must be 'min' or 'max'")
    if rule is not None and save_top_k != 1:
        raise MisconfigurationException(
            f"save_top_k={save_top_k} and retention={rule!r} both say what to keep: write KeepBest({save_top_k}) | ... "
            "in retention alone"
        )
    return Retention(rule or KeepBest(save_top_k), "min" if mode == "min" else "max")


def check_last(save_last: Any, dirpath: str | None) -> None:
    """Refuse a symbolic link where there can be none.

    Raises:
        MisconfigurationException: ``save_last="link"`` in a directory that is a URL.
    """
    if save_last == "link" and dirpath is not None and "://" in dirpath:
        raise MisconfigurationException(f"save_last='link' needs a local dirpath, not {dirpath!r}: use save_last=True")
