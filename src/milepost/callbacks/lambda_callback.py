"""A callback made of plain functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from milepost.callbacks.callback import Callback
from milepost.errors import MisconfigurationException

_NOT_HOOKS = frozenset({"state_key"})
HOOKS = frozenset(name for name in vars(Callback) if not name.startswith("_")) - _NOT_HOOKS


class LambdaCallback(Callback):
    """Runs the functions it is given as its hooks.

    Args:
        hooks: a function for each hook, with the hook's arguments:
            ``LambdaCallback(on_train_epoch_end=lambda trainer, module: print(trainer.current_epoch))``.
            None stands for no function.

    Raises:
        MisconfigurationException: a name is not that of a hook.
    """

    def __init__(self, **hooks: Callable[..., Any] | None) -> None:
        unknown = sorted(set(hooks) - HOOKS)
        if unknown:
            raise MisconfigurationException(f"no such hooks: {unknown}. Hooks are {sorted(HOOKS)}")
        for name, function in hooks.items():
            if function is not None:
                setattr(self, name, function)
