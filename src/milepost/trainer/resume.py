"""Which checkpoint a run goes on from: the meanings of ``ckpt_path``."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milepost.callbacks._naming import default_dirpath
from milepost.callbacks.model_checkpoint import ModelCheckpoint
from milepost.callbacks.on_exception import OnExceptionCheckpoint
from milepost.errors import CheckpointError, CheckpointNotFoundError, MisconfigurationException
from milepost.plugins.io import checkpoint_io as capabilities
from milepost.trainer.places import checkpoint_directories, requeue_directory
from milepost.trainer.signals import is_requeue_file, requeue_files

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer

_log = logging.getLogger("milepost")


def resolve_ckpt_path(
    trainer: Trainer, ckpt_path: str | os.PathLike[str] | None, *, model_provided: bool
) -> str | None:
    """The checkpoint that `ckpt_path` means for this call of fit, validate, test or predict; None: start without one.

    Args:
        trainer: its callbacks, plugin and directories say where to look.
        ckpt_path: a path; ``"best"`` by the first checkpointer; ``"last"``, the newest good one, of an earlier version
            of the logger's where this one has none; ``"hpc"``, what a job wrote when it was told to make way;
            ``"auto"``, the last or the hpc one if there is any, else a fresh start; None: the hpc one under SLURM, or
            what an exception left; to evaluate without a model the best.
        model_provided: whether the caller passed a model.

    Raises:
        CheckpointNotFoundError: nothing at the path; ``"hpc"`` or ``"best"`` without such a file.
        MisconfigurationException: ``"best"`` without a checkpointer.
    """
    fitting = trainer.state.fn == "fit"
    if ckpt_path is None:
        return _unasked(trainer, fitting=fitting, model_provided=model_provided)
    name = os.fspath(ckpt_path)
    if name == "best":
        return _best(trainer)
    if name == "last":
        found = newest_good(trainer, _candidates(trainer)) or _of_an_earlier_version(trainer, name)
        if found is None:
            places = ", ".join(checkpoint_directories(trainer)) or "no directory: the trainer has no checkpointer"
            warnings.warn(f"ckpt_path='last': no good checkpoint in {places}. Starting without one", stacklevel=2)
        return found
    if name == "hpc":
        found = newest_good(trainer, requeue_files(trainer)) or _of_an_earlier_version(trainer, name)
        if found is None:
            raise CheckpointNotFoundError(
                f"ckpt_path='hpc': no hpc checkpoint of this job in {requeue_directory(trainer)}. "
                "Pass ckpt_path='auto' to start fresh where there is none"
            )
        return found
    if name == "auto":
        here = newest_good(trainer, [*_candidates(trainer), *requeue_files(trainer)])
        return here or _of_an_earlier_version(trainer, name)
    return _path(trainer, name)


def newest_good(trainer: Any, candidates: Iterable[str]) -> str | None:
    """The newest of `candidates` by time of writing, then by name, that verifies; damaged ones are reported."""
    io = trainer.strategy.checkpoint_io
    for path in sorted(set(candidates), key=_age, reverse=True):
        try:
            verdict = capabilities.verify(io, path)
        except (CheckpointError, OSError, EOFError) as error:
            warnings.warn(f"passing over the damaged checkpoint {path}: {error}", stacklevel=2)
            continue
        if verdict == "cannot":
            _log.warning("%s cannot verify checkpoints: %s is taken to be good", type(io).__name__, path)
        return path
    return None


def _unasked(trainer: Any, *, fitting: bool, model_provided: bool) -> str | None:
    if fitting and "SLURM_JOB_ID" in os.environ:
        requeued = newest_good(trainer, requeue_files(trainer))
        if requeued is not None:
            return requeued
    if fitting:
        left = [c.ckpt_path for c in trainer.callbacks if isinstance(c, OnExceptionCheckpoint)]
        if any(Path(path).exists() for path in left):
            found = newest_good(trainer, _candidates(trainer))
            if found is not None:
                warnings.warn(
                    f"an exception left a checkpoint behind: going on from {found}, the newest. "
                    "Delete the crash file to start fresh",
                    stacklevel=2,
                )
            return found
    if model_provided or fitting:
        return None
    found = _best(trainer)
    warnings.warn(f"no model and no ckpt_path given: taking the best checkpoint, {found}", stacklevel=2)
    return found


def _best(trainer: Any) -> str:
    checkpointers = [c for c in trainer.checkpoint_callbacks if hasattr(c, "best_model_path")]
    if not checkpointers:
        raise MisconfigurationException(
            "ckpt_path='best' needs a ModelCheckpoint among the callbacks: add one, or pass the path of a checkpoint"
        )
    if trainer.fast_dev_run:
        raise MisconfigurationException(
            "ckpt_path='best' with fast_dev_run, which saves nothing: pass the path of a checkpoint"
        )
    if len(checkpointers) > 1:
        warnings.warn(
            f"ckpt_path='best' with {len(checkpointers)} checkpointers: taking that of the first, monitor="
            f"{getattr(checkpointers[0], 'monitor', None)!r}. Pass the best_model_path of another to use it",
            stacklevel=2,
        )
    path = checkpointers[0].best_model_path
    if not path:
        raise CheckpointNotFoundError(
            "ckpt_path='best': the checkpointer has saved none (best_model_path is empty). Fit first, with save_top_k "
            "other than 0, or pass the path of a checkpoint"
        )
    return str(path)


def _path(trainer: Any, name: str) -> str:
    if name.startswith("registry"):
        raise MisconfigurationException(f"ckpt_path={name!r}: model registries are not supported. Pass a path")
    path = name if "://" in name else str(Path(name).expanduser())
    io = trainer.strategy.checkpoint_io
    if "://" not in path and capabilities.exists(io, path) is False:
        if Path(path).exists():
            raise CheckpointNotFoundError(
                f"ckpt_path={path!r}: {type(io).__name__} reads nothing of this kind. Give Trainer(plugins=...) the "
                "CheckpointIO that wrote it (SnapshotCheckpointIO writes directories), or take a checkpoint in it"
            )
        raise CheckpointNotFoundError(f"ckpt_path={path!r}: nothing is there. Pass the path of a checkpoint, or 'auto'")
    return path


def _candidates(trainer: Any) -> list[str]:
    return _checkpoints_in(trainer, checkpoint_directories(trainer))


def _checkpoints_in(trainer: Any, directories: Iterable[str]) -> list[str]:
    io = trainer.strategy.checkpoint_io
    endings = {getattr(callback, "FILE_EXTENSION", ".ckpt") for callback in trainer.checkpoint_callbacks}
    found: list[str] = []
    for directory in directories:
        listed = capabilities.list_checkpoints(io, directory)
        if listed is None:
            place = Path(directory)
            listed = [str(entry) for entry in place.iterdir()] if place.is_dir() else []
        found += [p for p in listed if Path(p).suffix in endings and not Path(p).name.startswith(".") and _whole(p)]
    return found


def _of_an_earlier_version(trainer: Any, name: str) -> str | None:
    """The newest good checkpoint beside the directory of this run, where the logger has numbered that one itself.

    A process that is started again gets the next ``version_N``, which is empty: what it is to go on from lies in the
    one before. A checkpointer whose `dirpath` was given, or whose logger's version has a name, means that place only.
    """
    default = Path(default_dirpath(trainer))
    writes_there = any(
        isinstance(c, ModelCheckpoint) and not c.save_weights_only and c.dirpath in (None, str(default))
        for c in trainer.checkpoint_callbacks
    )
    if not writes_there or not re.fullmatch(r"version_\d+", default.parent.name):
        return None
    versions = [p for p in default.parent.parent.glob("version_*") if re.fullmatch(r"version_\d+", p.name)]
    saved = _checkpoints_in(trainer, (str(version / default.name) for version in versions))
    found = newest_good(trainer, [path for path in saved if name != "hpc" or is_requeue_file(path)])
    if found is not None:
        warnings.warn(
            f"ckpt_path={name!r}: nothing to go on from in {default}. Going on from {found}, the newest of the earlier "
            "versions. To mean one run only, give the logger its version, or the ModelCheckpoint a dirpath",
            stacklevel=3,
        )
    return found


def _whole(path: str) -> bool:
    """Not a symbolic link whose target is gone."""
    return not Path(path).is_symlink() or Path(path).exists()


def _age(path: str) -> tuple[int, bool, str]:
    # Two names of one file are equally old: the last is taken, so that retention stays free to drop the other.
    name = Path(path).name
    try:
        return (Path(path).stat().st_mtime_ns, name.startswith("last"), name)
    except OSError:
        return (0, name.startswith("last"), name)  # stored elsewhere by the plugin: only the name tells
