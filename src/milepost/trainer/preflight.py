"""What is tried before the first step, so that a save does not fail hours later."""

from __future__ import annotations

from typing import TYPE_CHECKING

from milepost.data.rng import isolated_rng
from milepost.plugins.io import checkpoint_io as io_calls
from milepost.trainer.state import dump_checkpoint

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer


def check_checkpoint(trainer: Trainer) -> None:
    """Ask the CheckpointIO whether it could store what a save would hold now. Nothing is written.

    Called once in a fit, after ``on_train_start``, when all that hooks of a save may look at is set up. The hooks
    ``on_save_checkpoint`` and ``state_dict`` run, since what they add is covered too; what they draw of random numbers
    is given back. Where they fail because nothing has been trained yet, that is told and training goes on.

    Raises:
        UnencodableValueError: names the key path of the value that cannot be stored as data.
    """
    savers = trainer.checkpoint_callbacks
    io = trainer.strategy.checkpoint_io
    if not savers or trainer.fast_dev_run or not io_calls.offers(io, "check"):
        return
    weights_only = all(getattr(saver, "save_weights_only", False) for saver in savers)
    with isolated_rng():
        try:
            checkpoint = dump_checkpoint(trainer, weights_only)
        except Exception as error:
            trainer.warn_once(
                "What a checkpoint will hold could not be checked before the first step: a hook of the save failed"
                f" with {type(error).__name__}: {error}. A save after a step may work."
            )
            return
    trainer.strategy.check_checkpoint(checkpoint)
