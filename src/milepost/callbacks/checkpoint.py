"""The marker by which the Trainer recognises a checkpointing callback."""

from __future__ import annotations

from milepost.callbacks.callback import Callback


class Checkpoint(Callback):
    """Derive from this to write your own checkpointing callback.

    The `Trainer` recognises any subclass: it lists it in ``trainer.checkpoint_callbacks``, runs its hooks after those
    of all other callbacks and of the module, so that what it saves is what the step left behind, and adds no default
    `ModelCheckpoint` beside it.
    """
