"""Hyper-parameters: collected from the constructor's frame, kept on the object, stored in the checkpoint."""

from __future__ import annotations

import copy
import inspect
import types
from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch

from milepost.data.rng import isolated_rng
from milepost.errors import MisconfigurationException

T = TypeVar("T")


class AttributeDict(dict[str, Any]):
    """A dict whose keys are attributes too: ``hparams.lr`` and ``hparams["lr"]``."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError as error:
            raise AttributeError(f"no hyper-parameter {key!r}; there are: {sorted(self)}") from error

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value


class Hyperparameters:
    """Gives a Module or a DataModule ``save_hyperparameters`` and ``hparams``."""

    _hparams: AttributeDict
    _hparams_initial: AttributeDict
    _hparams_name: str
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
            ignore: names to leave out, such as a module that was passed in.
            frame: the frame to read the arguments from; the caller's by default.
            logger: whether the loggers are told of them.

        Raises:
            MisconfigurationException: a name in `args` is no argument of the constructor.
        """
        caller = frame or inspect.currentframe().f_back  # type: ignore[union-attr]
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        if len(args) == 1 and not isinstance(args[0], str):
            chosen, name = _as_mapping(args[0]), _argument_name(caller, args[0])
        else:
            available = _constructor_arguments(caller, type(self))
            unknown = [a for a in args if a not in available]
            if unknown:
                raise MisconfigurationException(
                    f"save_hyperparameters({unknown[0]!r}): {type(self).__name__}.__init__ has no such argument. "
                    f"Its arguments are {sorted(available)}."
                )
            chosen = {k: available[k] for k in args} if args else available
            name = "kwargs"
        merged = {k: v for k, v in chosen.items() if k not in ignored}
        self._hparams = AttributeDict({**getattr(self, "_hparams", {}), **merged})
        self._hparams_name = name
        self._log_hyperparams = logger
        self._hparams_initial = AttributeDict({k: _copied(v) for k, v in self._hparams.items()})

    @property
    def hparams(self) -> AttributeDict:
        """What `save_hyperparameters` kept; empty before."""
        if not hasattr(self, "_hparams"):
            self._hparams = AttributeDict()
        return self._hparams

    @property
    def hparams_initial(self) -> AttributeDict:
        """A copy of the hyper-parameters as they were when they were saved."""
        return AttributeDict(getattr(self, "_hparams_initial", {}))


def _copied(value: Any) -> Any:
    return value if isinstance(value, torch.nn.Module) else copy.deepcopy(value)


def _as_mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Namespace):
        return vars(value).copy()
    raise MisconfigurationException(
        f"save_hyperparameters takes argument names, a mapping or a Namespace; got {type(value).__name__}."
    )


def _argument_name(frame: Any, value: Any) -> str:
    extra = inspect.getargvalues(frame).keywords  # cannot be passed back under its own name
    for name, local in frame.f_locals.items():
        if local is value and name != extra:
            return str(name)
    return "kwargs"


def _constructor_arguments(frame: Any, cls: type) -> dict[str, Any]:
    """Arguments of the running ``__init__`` and of every subclass's ``__init__`` above it on the stack."""
    collected: dict[str, Any] = {}
    while (
        frame is not None
        and frame.f_code.co_name == "__init__"
        and isinstance(frame.f_locals.get(_self_name(frame)), cls)
    ):
        info = inspect.getargvalues(frame)
        found = {name: info.locals[name] for name in info.args[1:] if name in info.locals}
        if info.keywords and info.keywords in info.locals:
            found.update(info.locals[info.keywords])
        collected.update(found)
        frame = frame.f_back
    collected.pop("__class__", None)
    return collected


def _self_name(frame: types.FrameType) -> str:
    return frame.f_code.co_varnames[0] if frame.f_code.co_argcount else ""


def instantiate(cls: type[T], saved: Mapping[str, Any], overrides: Mapping[str, Any], *, name: str) -> T:
    """Build `cls` from hyper-parameters saved in a checkpoint. The caller's RNG is left alone."""
    values: dict[str, Any] = {**saved, **overrides}
    parameters = inspect.signature(cls.__init__).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if name != "kwargs" and name in parameters:
        arguments = {name: AttributeDict(values), **{k: v for k, v in overrides.items() if k in parameters}}
    else:
        arguments = {k: v for k, v in values.items() if takes_any or k in parameters}
    missing = [
        p.name
        for p in list(parameters.values())[1:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in arguments
    ]
    if missing:
        raise TypeError(
            f"{cls.__name__} needs {missing}, which the checkpoint does not hold. Pass them as keyword arguments, "
            "or call self.save_hyperparameters() in __init__ before training."
        )
    with isolated_rng():
        return cls(**arguments)
