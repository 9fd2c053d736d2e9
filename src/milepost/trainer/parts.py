"""The parts of a checkpoint that ``Trainer.fit(restore=...)`` can take alone. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from milepost.errors import MisconfigurationException

Part = Literal["model", "datamodule", "callbacks", "precision", "optimizer", "scheduler", "loops", "rng"]

EVERY: frozenset[str] = frozenset(get_args(Part))


def resolve_parts(restore: Iterable[str] | str | None) -> frozenset[str]:
    """The parts that `restore` names; None: every one.

    Raises:
        MisconfigurationException: it names none, or one that there is not.
    """
    if restore is None:
        return EVERY
    named = frozenset({restore} if isinstance(restore, str) else restore)
    if unknown := sorted(named - EVERY):
        raise MisconfigurationException(f"restore names {unknown}; a checkpoint has the parts {sorted(EVERY)}")
    if not named:
        raise MisconfigurationException("restore names no part: leave ckpt_path out to start without a checkpoint")
    return named


def report(checkpoint: Mapping[str, Any], parts: frozenset[str], *, datamodule: str, precision: str) -> dict[str, str]:
    """For every part ``"restored"``, ``"left out"`` or ``"not in the checkpoint"``.

    Args:
        datamodule: the key under which the data module's state stands.
        precision: the same of the precision.
    """
    keys = {
        "model": "state_dict",
        "datamodule": datamodule,
        "callbacks": "callbacks",
        "precision": precision,
        "optimizer": "optimizer_states",
        "scheduler": "lr_schedulers",
        "loops": "loops",
        "rng": "milepost",
    }

    def fate(part: str) -> str:
        return (
            "left out" if part not in parts else "restored" if checkpoint.get(keys[part]) else "not in the checkpoint"
        )

    return {part: fate(part) for part in get_args(Part)}
