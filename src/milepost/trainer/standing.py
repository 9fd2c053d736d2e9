"""Where a run stands: what tells a resumed run how to go on, beside weights, optimizers and callbacks.

Most checkpoints are written at a point from which the run simply goes on, and then this is taken when they are. Inside
a validation, inside a batch that an error interrupts, and once the loop has ended it is the last such point before.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from milepost.callbacks.callback import Callback
from milepost.callbacks.checkpoint import Checkpoint
from milepost.data.rng import RngState
from milepost.loggers.logger import Logger
from milepost.trainer.metric_state import metric_states
from milepost.trainer.modes import parts_in_eval
from milepost.trainer.optimization import Reached
from milepost.trainer.progress import Phase

if TYPE_CHECKING:
    from milepost.data.stream import BatchStream
    from milepost.trainer.metrics import Metrics
    from milepost.trainer.trainer import Trainer


@dataclass(frozen=True)
class Standing:
    """A point of the run from which it can go on.

    Attributes:
        epoch: index of the epoch.
        loops: counters, the value of ``checkpoint["loops"]["fit_loop"]``.
        exact: all that Lightning's format has no place for, in plain values and tensors.
        callbacks: states of the callbacks where those at the time of saving are not the right ones.
    """

    epoch: int
    loops: dict[str, Any]
    exact: dict[str, Any]
    callbacks: dict[str, Any] | None = None

    @classmethod
    def now(cls, trainer: Trainer, phase: Phase | None = None) -> Standing:
        """The point that `trainer` is at, to be gone on from as from `phase`. Consumes no random numbers."""
        loop = trainer.fit_loop
        validation = trainer.evaluation_loops["validation"]
        phase = phase or loop.phase
        exact: dict[str, Any] = {
            "version": 1,
            "phase": str(phase),
            "world_size": trainer.world_size,
            "data_seed": trainer.data_seed,
            "rng": RngState.capture().state_dict(),
            "metrics": trainer.metrics.state_dict(trainer.lightning_module),
            "loggers": logger_states(trainer),
            "in_eval": parts_in_eval(trainer.lightning_module, validation.interrupted_modes),
            "validated_batches": dict(validation.seen_batches),
            "metric_objects": metric_states(trainer.lightning_module, skip=trainer.metrics.evaluated_objects()),
            "loaders": {
                name: {**part.loading.state_dict(), "resting": part.stream.resting_state()}
                for name, part in (("train", loop.data), ("val", validation))
                if part.stream is not None and part.loading is not None
            },
        }
        loops = loop.progress.state_dict()
        if (data := loop.data_position(phase)) is not None:
            exact["data"] = data
            exact["loaders"]["train"]["resting"] = None
            _add_own_states(loops, loop.stream, data)
        return cls(trainer.current_epoch, loops, exact)

    def with_callbacks(self, states: dict[str, Any]) -> Standing:
        """The same, with the callbacks' `states` of now."""
        return Standing(self.epoch, self.loops, self.exact, copy.deepcopy(states))

    def callback_state(self, key: str, callback: Any) -> Any:
        """What to save of `callback`. A checkpointer's record is of files, and always that of now."""
        if self.callbacks is None or isinstance(callback, Checkpoint):
            return callback.state_dict()
        return self.callbacks.get(key)


@dataclass(frozen=True)
class BeforeBatch:
    """What a checkpoint that is written while a batch is under way goes back to.

    Attributes:
        position: of the stream.
        rng: random state, None where nobody would save after an error: taking it costs more than the rest of a step.
        metrics: what was logged.
    """

    position: dict[str, Any]
    rng: RngState | None = None
    metrics: Metrics | None = None

    @classmethod
    def now(cls, trainer: Trainer, stream: BatchStream, everything: bool) -> BeforeBatch:
        position = stream.state_dict()
        if not everything:
            return cls(position)
        return cls(position, RngState.capture(), trainer.metrics.mark())

    def standing(self, trainer: Trainer) -> Standing:
        """The point before the batch, as far as it is known."""
        progress = copy.deepcopy(trainer.fit_loop.progress)
        progress.batch.forget_unfinished()
        for counts in (progress.optimizer_step, progress.manual_step):
            counts.forget_unfinished()
        now = Standing.now(trainer, Phase.BATCH_DONE)
        exact = {**now.exact, "data": self.position}
        if self.rng is not None and self.metrics is not None:
            exact["rng"] = self.rng.state_dict()
            exact["metrics"] = self.metrics.state_dict(trainer.lightning_module)
        loops = progress.state_dict()
        _add_own_states(loops, trainer.fit_loop.stream, self.position)
        return Standing(now.epoch, loops, exact)

    def altered(self, trainer: Trainer) -> list[str]:
        """What the batch has changed by now that `standing` cannot undo."""
        loop, module = trainer.fit_loop, trainer.lightning_module
        reached, found = loop.optimization.reached, []
        batch = loop.progress.batch.current
        if self.rng is None and batch.ready > batch.processed:  # fetching it moves none
            found.append("random state")
        if reached is Reached.NOTHING:
            return found
        if not module.automatic_optimization:
            found.append("whatever its training_step optimizes by hand")
        if any(True for _ in module.buffers()):
            found.append("buffers of the model (BatchNorm's statistics are such)")
        if any(state.get("updates") for state in metric_states(module).values()):
            found.append("what metric objects have accumulated")
        if reached is not Reached.FORWARD and loop.gradients_pending:
            found.append("the gradients accumulated so far")
        if reached is Reached.STEP:
            found.append("weights and optimizer state")
        return found


def _add_own_states(loops: dict[str, Any], stream: BatchStream | None, position: dict[str, Any]) -> None:
    """States of loaders that have one, where Lightning keeps them."""
    if stream is not None and (own := stream.own_states(position)):
        loops["state_dict"] = {"combined_loader": own}


def saves_on_exception(trainer: Trainer) -> bool:
    """Whether a callback may save when an error ends the run."""
    return any(
        type(callback).on_exception is not Callback.on_exception and getattr(callback, "save_on_exception", True)
        for callback in trainer.checkpoint_callbacks
    )


def callback_keys(trainer: Trainer) -> list[tuple[str, Any]]:
    """Every callback with the key of its state. A second callback with the same key gets ``#2``."""
    seen: dict[str, int] = {}
    keyed = []
    for callback in trainer.callbacks:
        key = callback.state_key
        seen[key] = seen.get(key, 0) + 1
        keyed.append((key if seen[key] == 1 else f"{key}#{seen[key]}", callback))
    return keyed


def callback_states(trainer: Trainer) -> dict[str, Any]:
    """States of the callbacks that have any, by key."""
    return {key: state for key, callback in callback_keys(trainer) if (state := callback.state_dict())}


def logger_states(trainer: Trainer) -> list[dict[str, Any]]:
    """How far each logger has come; empty for those written for Lightning, which do not say."""
    return [logger.state_dict() if isinstance(logger, Logger) else {} for logger in trainer.loggers]


def restore_loggers(trainer: Trainer, states: list[dict[str, Any]]) -> None:
    """Before anything is recorded: what lies after the checkpoint is going to be recorded once more."""
    for logger, state in zip(trainer.loggers, states, strict=False):
        if state and isinstance(logger, Logger):
            logger.load_state_dict(state)
