"""Where a run's checkpoints lie."""

from __future__ import annotations

import os
from typing import Any

from milepost.callbacks._naming import default_dirpath
from milepost.callbacks.model_checkpoint import ModelCheckpoint


def checkpoint_directories(trainer: Any) -> list[str]:
    """Where the checkpointers of `trainer` save files from which training can go on, without repetition."""
    places: list[str] = []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            if not callback.save_weights_only:
                places.append(callback.dirpath or default_dirpath(trainer))
        elif getattr(callback, "dirpath", None):
            places.append(os.fspath(callback.dirpath))
    return list(dict.fromkeys(places))


def requeue_directory(trainer: Any) -> str:
    """Where a run saves when a signal asks it to stop.

    Under SLURM `default_root_dir`, as in Lightning: the number of the job tells whose a file is. Elsewhere nothing
    would, and runs that are started in one directory would go on from each other's; so it lies beside the run's
    checkpoints.
    """
    if "SLURM_JOB_ID" not in os.environ:
        for place in checkpoint_directories(trainer):
            if "://" not in place:
                return place
    return str(trainer.default_root_dir)
