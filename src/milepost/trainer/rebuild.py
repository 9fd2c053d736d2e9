"""Building a module or a data module anew from what a checkpoint says of its constructor's arguments."""

from __future__ import annotations

import ast
import copy
import csv
import inspect
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from milepost._optional import require
from milepost.errors import CheckpointNotFoundError, MisconfigurationException
from milepost.trainer.hparams import AttributeDict, is_config

T = TypeVar("T")

if TYPE_CHECKING:
    on_the_class_only = classmethod
else:

    class on_the_class_only(classmethod):
        """A classmethod that refuses to be called on an instance, which would be left as it is."""

        def __get__(self, instance: Any, owner: Any = None) -> Any:
            if instance is None:
                return super().__get__(instance, owner)
            name = f"{owner.__name__}.{self.__func__.__name__}"

            def refuse(*args: Any, **kwargs: Any) -> Any:
                raise TypeError(
                    f"{name} was called on an instance, which it does not change: it returns a new one. Call it on the"
                    f" class: model = {name}(...)"
                )

            return refuse


def instantiate(cls: type[T], checkpoint: Mapping[str, Any], overrides: Mapping[str, Any], *, prefix: str = "") -> T:
    """Build `cls` from the hyper-parameters in `checkpoint`; those that its constructor does not take are dropped.

    Args:
        overrides: arguments that go before the saved ones.
        prefix: of the keys: ``""`` for a module, ``"datamodule_"`` for a data module.

    Raises:
        TypeError: an argument without a default is neither saved nor given.
    """
    saved = checkpoint.get(f"{prefix}hyper_parameters", {})
    values = {**saved, **overrides}
    _without_instantiator(values)
    name = checkpoint.get(f"{prefix}hparams_name")
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if name in named:
        values = {**overrides, name: _overridden(saved, overrides) if is_config(saved) else AttributeDict(values)}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        values = {key: value for key, value in values.items() if key in named}
    required = [p.name for p in parameters if p.name in named and p.default is p.empty]
    if missing := [key for key in required if key not in values]:
        raise TypeError(
            f"{cls.__name__} needs {missing}, which the checkpoint does not hold. Pass them as keyword arguments, "
            "or call self.save_hyperparameters() in __init__ before training."
        )
    return cls(**values)


def _overridden(config: Any, overrides: Mapping[str, Any]) -> Any:
    config = copy.deepcopy(config)
    config.update(overrides)
    return config


def _without_instantiator(values: dict[str, Any]) -> None:
    """Lightning's command line names a function that is to build the object: a file does not choose what code runs."""
    named = values.pop("_instantiator", None)
    values.pop("_class_path", None)
    if named is not None and any(isinstance(v, Mapping) and "class_path" in v for v in values.values()):
        warnings.warn(
            f"The hyper-parameters were saved by Lightning's command line, with the function {named!r} to build objects"
            " from their 'class_path'. It is not run, and they stay dicts: pass them as keyword arguments.",
            UserWarning,
            stacklevel=4,
        )


def read_hparams(path: str | Path) -> dict[str, Any]:
    """Hyper-parameters from a file that a logger wrote: ``hparams.yaml``, or ``key,value`` lines in a ``.csv``.

    Raises:
        CheckpointNotFoundError: no such file.
        MisconfigurationException: another ending, or values that are no plain data.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml", ".csv"):
        raise MisconfigurationException(f"hparams_file={str(path)!r}: it must be a .yaml, .yml or .csv file.")
    if not path.is_file():
        raise CheckpointNotFoundError(f"hparams_file={str(path)!r}: nothing is there.")
    text = path.read_text()
    if path.suffix == ".csv":
        rows = list(csv.reader(text.splitlines()))[1:]
        return {row[0]: _literal(row[1]) for row in rows if row}
    found = _yaml(text, path)
    if not isinstance(found, dict):
        raise MisconfigurationException(f"hparams_file={str(path)!r} holds {type(found).__name__}, not a mapping.")
    return found


def _yaml(text: str, path: Path) -> Any:
    try:
        return json.loads(text)  # as our loggers write it; every JSON text is YAML too
    except ValueError:
        pass
    yaml = require("yaml", extra="yaml", needed_by=f"hparams_file={str(path)!r}")
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise MisconfigurationException(
            f"hparams_file={str(path)!r} is no YAML of plain values: {error}. Take out what is tagged `!!python`, and"
            " pass it as a keyword argument."
        ) from error


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
