"""The names of the actions that a profiler gets to see. They are Lightning's, where Lightning has the action."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any
from weakref import proxy

from milepost.callbacks.callback import Callback
from milepost.profilers.profiler import PassThroughProfiler
from milepost.strategies.strategy import Strategy
from milepost.trainer.datamodule import DataModule
from milepost.trainer.module import Module

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer

_KINDS = ((Module, "LightningModule"), (DataModule, "LightningDataModule"), (Strategy, "Strategy"))
_NOTHING = nullcontext()


def profiled(profiler: Any, action: str, owner: Any = None) -> AbstractContextManager[Any]:
    """Measures what is inside, as `action` of `owner`, such as ``[LightningModule]Net.on_train_start``."""
    if isinstance(profiler, PassThroughProfiler):
        return _NOTHING
    if owner is not None:
        kind = next((name for cls, name in _KINDS if isinstance(owner, cls)), "Callback")
        name = owner.state_key if kind == "Callback" and isinstance(owner, Callback) else type(owner).__name__
        action = f"[{kind}]{name}.{action}"
    context: AbstractContextManager[Any] = profiler.profile(action)
    return context


def begin_profile(trainer: Trainer) -> None:
    """A run begins, its module is known. Only `profile` is asked of a profiler, the rest is called where it is."""
    profiler = trainer.profiler
    if isinstance(profiler, PassThroughProfiler):
        return
    if hasattr(profiler, "_lightning_module"):  # ours and Lightning's PyTorchProfiler
        profiler._lightning_module = proxy(trainer.lightning_module)
    if (setup := getattr(profiler, "setup", None)) is not None:
        rank = trainer.local_rank if trainer.world_size > 1 else None
        setup(stage=trainer.state.fn, local_rank=rank, log_dir=trainer.log_dir)


def end_profile(trainer: Trainer) -> None:
    """The run has ended, by an error or not: report what was found."""
    profiler = trainer.profiler
    if (describe := getattr(profiler, "describe", None)) is not None:
        describe()
    if (teardown := getattr(profiler, "teardown", None)) is not None:
        teardown(stage=trainer.state.fn)
