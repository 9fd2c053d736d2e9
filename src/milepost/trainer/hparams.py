"""Hyper-parameters: collected from the constructor's frame, kept on the object, stored in the checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import types
import warnings
from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from milepost.errors import MisconfigurationException


class AttributeDict(dict[str, Any]):
    """A dict whose keys are attributes too: ``hparams.lr`` and ``hparams["lr"]``."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError as error:
            raise AttributeError(f"no hyper-parameter {key!r}; there are: {sorted(self)}") from error

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value

    def __delattr__(self, key: str) -> None:
        if key not in self:
            raise AttributeError(f"no hyper-parameter {key!r}; there are: {sorted(self)}")
        del self[key]

    def __repr__(self) -> str:
        """One line for each, in order of the names."""
        width = max((len(str(key)) for key in self), default=0) + 3
        names = {key: f'"{key}":' for key in sorted(self)}
        return "\n".join(f"{name:<{width}} {self[key]}" for key, name in names.items())


class Hyperparameters:
    """Gives a Module or a DataModule ``save_hyperparameters`` and ``hparams``."""

    _hparams: AttributeDict
    _hparams_initial: AttributeDict
    _hparams_name: str | None
    _log_hyperparams: bool = False

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: str | Iterable[str] | None = None,
        frame: types.FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep the constructor's arguments under ``self.hparams`` and in every checkpoint.

        Args:
            args: names of constructor arguments to keep (none: all), or one mapping or namespace of hyper-parameters.
                The arguments are those of every ``__init__`` of this object that is running, subclasses' before
                their bases'; of a dataclass its fields. A later call adds to what earlier ones kept.
            ignore: names to leave out, such as a module that was passed in; also of what was kept before.
            frame: the frame to read the arguments from; the caller's by default.
            logger: whether the loggers are told of them.

        Raises:
            MisconfigurationException: a name in `args` is no argument of the constructor, or what stands in the place
                of the mapping is none.
        """
        caller = frame or inspect.currentframe().f_back  # type: ignore[union-attr]
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        available = {k: v for k, v in _constructor_arguments(caller, self).items() if k not in ignored}
        chosen, name = _chosen(args, available, type(self).__name__)
        merged = {**getattr(self, "_hparams", {}), **chosen}
        config = next((arg for arg in args if is_config(arg)), None)
        self._hparams = config or AttributeDict({k: v for k, v in merged.items() if k not in ignored})
        self._hparams_name = name
        self._log_hyperparams = logger
        _warn_of_modules(self._hparams)
        self._hparams_initial = _copies(self._hparams)

    @property
    def hparams(self) -> AttributeDict:
        """What `save_hyperparameters` kept; empty before."""
        if not hasattr(self, "_hparams"):
            self._hparams = AttributeDict()
        return self._hparams

    @property
    def hparams_initial(self) -> AttributeDict:
        """A copy of the hyper-parameters as they were when they were saved."""
        copies: AttributeDict = _copies(getattr(self, "_hparams_initial", AttributeDict()))
        return copies


def is_config(value: Any) -> bool:
    """Whether `value` is a mapping of OmegaConf's. It is kept whole, for its parts refer to each other through it."""
    return isinstance(value, Mapping) and type(value).__module__.startswith("omegaconf.")


def storable(hparams: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those that go into a checkpoint: a module's weights are there already, and its code is no data."""
    if is_config(hparams):
        return hparams
    return {key: value for key, value in hparams.items() if not isinstance(value, torch.nn.Module)}


def _copies(hparams: Any) -> Any:
    if is_config(hparams):
        return copy.deepcopy(hparams)
    return AttributeDict({k: v if isinstance(v, torch.nn.Module) else copy.deepcopy(v) for k, v in hparams.items()})


def _warn_of_modules(hparams: Mapping[str, Any]) -> None:
    for key, value in hparams.items():
        if isinstance(value, torch.nn.Module):
            warnings.warn(
                f"The hyper-parameter {key!r} is a torch module. It is left out of checkpoints, where its weights are"
                f" already: give it to load_from_checkpoint({key}=...). To be without this warning, call"
                f" self.save_hyperparameters(ignore=[{key!r}]).",
                UserWarning,
                stacklevel=3,
            )


def _chosen(args: tuple[Any, ...], available: dict[str, Any], owner: str) -> tuple[dict[str, Any], str | None]:
    """What to keep, and the name of the argument that it came in as; ``"kwargs"`` where each came in as its own."""
    whole = [arg for arg in args if not isinstance(arg, str)]
    if len(whole) > 1:
        raise MisconfigurationException(
            f"save_hyperparameters takes argument names, or one mapping or Namespace; got {len(whole)} of these."
        )
    if whole:
        return _as_mapping(whole[0]), _argument_name(available, whole[0])
    if unknown := [a for a in args if a not in available]:
        raise MisconfigurationException(
            f"save_hyperparameters({unknown[0]!r}): {owner}.__init__ has no such argument. "
            f"Its arguments are {sorted(available)}."
        )
    if args:
        return {k: available[k] for k in args}, "kwargs"
    return available, "kwargs" if available else None


def _as_mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Namespace):
        return vars(value).copy()
    raise MisconfigurationException(
        f"save_hyperparameters takes argument names, a mapping or a Namespace; got {type(value).__name__}. Pass"
        " dataclasses.asdict(...) of a dataclass, or name the argument."
    )


def _argument_name(available: Mapping[str, Any], value: Any) -> str | None:
    """The argument that `value` is, or else one that equals it: a copy can be given back in its place."""
    same = [name for name, given in available.items() if given is value]
    return next(iter([*same, *(name for name, given in available.items() if _equal(given, value))]), None)


def _equal(left: Any, right: Any) -> bool:
    try:
        return type(left) is type(right) and bool(left == right)
    except (RuntimeError, ValueError):  # tensors or arrays inside: they compare element by element
        return False


def _constructor_arguments(frame: types.FrameType | None, owner: object) -> dict[str, Any]:
    """Arguments of each ``__init__`` of `owner` that is running above `frame`; those of subclasses go first."""
    if dataclasses.is_dataclass(owner):
        return {field.name: getattr(owner, field.name) for field in dataclasses.fields(owner)}
    collected: dict[str, Any] = {}
    while frame is not None:
        if frame.f_code.co_name == "__init__" and frame.f_code.co_argcount:
            info = inspect.getargvalues(frame)
            if info.locals.get(info.args[0]) is owner:
                collected.update({name: info.locals[name] for name in info.args[1:] if name in info.locals})
                collected.update(info.locals.get(info.keywords or "", {}))
        frame = frame.f_back
    return collected
