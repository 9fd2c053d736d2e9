"""OmegaConf's containers as data. The package is used only where the program has imported it itself."""

from __future__ import annotations

import enum
import pathlib
import sys
from typing import Any

from milepost.engine.value_classes import Unresolved

_LEAVES = (str, int, float, bool, bytes, type(None), enum.Enum, pathlib.PurePath)


def is_config(value: Any) -> bool:
    """Whether `value` is a DictConfig or a ListConfig."""
    found = sys.modules.get("omegaconf")
    return found is not None and isinstance(value, (found.DictConfig, found.ListConfig))


def contents(config: Any) -> Any:
    """Dicts, lists and values of `config`. Interpolations stay as they are written."""
    return sys.modules["omegaconf"].OmegaConf.to_container(config, resolve=False)


def flags(config: Any) -> list[bool]:
    """Whether it is read-only, and whether it refuses new keys."""
    found = sys.modules["omegaconf"].OmegaConf
    return [bool(found.is_readonly(config)), bool(found.is_struct(config))]


def make(data: Any, given: list[bool]) -> Any:
    """A config with these contents and flags.

    Raises:
        Unresolved: the program has not imported omegaconf. TypeError: `data` is not what `contents` returns.
    """
    found = sys.modules.get("omegaconf")
    if found is None:
        raise Unresolved("omegaconf:OmegaConf")
    if not isinstance(data, (dict, list)):  # it would read a text as YAML
        raise TypeError(f"a {type(data).__name__} is no contents of a config")
    _check(data)
    readonly, struct = given
    return found.OmegaConf.create(data, flags={"readonly": bool(readonly), "struct": bool(struct)})


def _check(data: Any) -> None:
    """Nothing but what a config is made of: it looks into objects of other kinds."""
    if type(data) in (dict, list):
        for part in [*data, *data.values()] if isinstance(data, dict) else data:
            _check(part)
    elif not isinstance(data, _LEAVES):
        raise TypeError(f"a {type(data).__name__} is no value of a config")
