"""Who may change what a save still copies, while the run goes on.

A plugin with lazy staging copies parameters and the optimizers' state after its save has returned, and holds the next
optimizer step back until that is done. Steps aside, only `training_step` and `backward` run meanwhile: before any other
hook that is not Milepost's own code, and before Milepost itself writes to weights, the copy is finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
        self._by_checkpointer = False
        self.pending = False

    @contextmanager
    def saving(self, owner: Any, function: Any) -> Iterator[None]:
        """Around a hook of a checkpointer: what Milepost's own save may be copied late, nobody else's."""
        before, self._by_checkpointer = self._by_checkpointer, isinstance(owner, Checkpoint) and is_ours(function)
        try:
            yield
        finally:
            self._by_checkpointer = before

    def optimizers(self) -> Sequence[Any]:
        """Those to be named to the plugin for a save at this moment."""
        trainer = self._trainer
        in_the_loop = self._by_checkpointer and trainer.state.fn == "fit"
        if not in_the_loop or not io_calls.copies_later(trainer.strategy.checkpoint_io):
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
