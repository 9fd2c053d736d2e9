"""Who may change what a save still copies, while the run goes on.

A plugin with lazy staging copies parameters and the optimizers' state after its save has returned, and holds the next
optimizer step back until that is done. Steps aside, only `training_step` and `backward` run meanwhile: before any other
hook that is not Milepost's own code, and before Milepost itself writes to weights, the copy is finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from milepost.callbacks.checkpoint import Checkpoint
from milepost.plugins.io import checkpoint_io as io_calls

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer

DIRECT = frozenset({"optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step"})
"""Hooks of the module that the loop calls itself, and that may be the user's."""


class LateCopies:
    """What the last save of a checkpointer still copies."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.caller: tuple[Any, str] | None = None
        """The checkpointer whose hook runs, and the hook's name."""
        self.pending = False

    def optimizers(self) -> Sequence[Any]:
        """Those to be named to the plugin for a save now: none, but for saves of Milepost's checkpointers."""
        trainer = self._trainer
        if self.caller is None or trainer.state.fn != "fit":
            return ()
        callback, hook = self.caller
        known = isinstance(callback, Checkpoint) and is_ours(getattr(callback, hook))
        if not known or not io_calls.copies_later(trainer.strategy.checkpoint_io):
            return ()
        self.pending = True
        return trainer.optimizers

    def before(self, function: Any) -> None:
        """Called before `function`, a hook: finishes the copy where that is not known to leave weights alone."""
        if self.pending and not is_ours(function):
            self.finish()

    def finish(self) -> None:
        """Wait until all is copied."""
        if self.pending:
            io_calls.staged(self._trainer.strategy.checkpoint_io)
            self.pending = False


def is_ours(function: Any) -> bool:
    """Whether `function` is Milepost's own code, and no wrapper of ours around another's or of others around ours."""
    plain = getattr(function, "__func__", function)
    names = (getattr(plain, "__module__", None), getattr(plain, "__globals__", {}).get("__name__"))
    return all(isinstance(name, str) and name.startswith("milepost.") for name in names)
