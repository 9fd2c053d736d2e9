"""Checkpoints as directories, written while training goes on."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from milepost.engine.commit import REPLACED
from milepost.engine.directory import DirectoryEngine, DirectorySave
from milepost.engine.lazy import changed_by_steps
from milepost.errors import MisconfigurationException
from milepost.format.manifest import HEAD_NAME
from milepost.plugins.io.checkpoint_io import CheckpointIO, refuse_storage_options
from milepost.storage import local


class SnapshotCheckpointIO(CheckpointIO):
    """A checkpoint is a directory: plain safetensors files, indexes with digests, a manifest (docs/format.md).

    `save_checkpoint` copies the state to host memory and returns; the copy is written while training goes on, past the
    page cache, only where it changed since the last checkpoint. It is there whole or not at all. `ModelCheckpoint`
    counts it once it is durable. Loading verifies every byte and runs no code. Where several ranks train, each writes
    what is its own, and all of it becomes one directory (docs/many-ranks.md).

    Args:
        background: False: `save_checkpoint` returns when the checkpoint is durable, and no memory is taken for a copy.
        lazy: in the background, copy parameters and the optimizers' state after `save_checkpoint` has returned: the
            next optimizer step waits for it. Ask for it where nothing but steps writes to parameters in forward and
            backward; what the Trainer's hooks and callbacks do is seen to. docs/checkpointing.md says what is copied
            at once all the same.
        threads: that copy, digest and write.
        allow_pickle: pickle what cannot be stored as data, without a word. Such a checkpoint loads only with
            ``weights_only=False``. Otherwise `check` refuses such a value before training, and one that turns up later
            is pickled with a warning, so that no step is lost for it.
    """

    every_rank = True

    def __init__(
        self, *, background: bool = True, lazy: bool = False, threads: int = 2, allow_pickle: bool = False
    ) -> None:
        if lazy and not background:
            raise MisconfigurationException("lazy=True copies in the background: it needs background=True.")
        self._lazy = lazy
        self._engine = DirectoryEngine(threads=threads, ranks="auto")
        self._background = background
        self._allow_pickle = allow_pickle

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any = None,
        *,
        optimizers: Sequence[Any] = (),
    ) -> DirectorySave:
        """Save `checkpoint`. Returns a handle that is done once it is durable.

        Args:
            optimizers: with ``lazy=True``, those whose parameters and state nothing changes but their ``step``, until
                `staged` is called.

        Raises:
            CheckpointSaveError: an earlier save in the background failed and nobody was told; or, not in the
                background, this one. What was at `path` before is intact.
            TypeError: `storage_options` was given.
        """
        refuse_storage_options(self, storage_options)
        step = checkpoint.get("global_step", 0) if isinstance(checkpoint, dict) else 0
        warn = silent if self._allow_pickle else warn_of_pickle
        lazy = changed_by_steps(optimizers) if self._lazy else None
        return self._engine.save(path, checkpoint, step=step, background=self._background, lazy=lazy, pickled=warn)

    def staged(self) -> None:
        """Wait until what is being saved is copied, and its tensors may be changed by anybody."""
        self._engine.staged()

    def check(self, checkpoint: dict[str, Any]) -> None:
        """Find what a save could only pickle; nothing is written.

        Raises:
            UnencodableValueError: names the value's key path.
        """
        if not self._allow_pickle:
            self._engine.check(checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load and verify; tensors go to the CPU unless `map_location` says otherwise.

        Args:
            weights_only: False loads pickled values too, which runs code of the checkpoint.

        Raises:
            CheckpointNotFoundError, CheckpointCorruptError, UnsafeCheckpointError, CheckpointFormatError
        """
        loaded = self._engine.load(path, unpickle=weights_only is False)
        return loaded if map_location is None else moved(loaded, map_location)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove it, after every save asked for before; where there is none, do nothing."""
        self._engine.remove(path)

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Whether a checkpoint is there, also while it is being replaced on a file system that cannot exchange two."""
        path = Path(path)
        return any((place / HEAD_NAME).is_file() for place in (path, path.with_name(REPLACED + path.name), path))

    def list(self, directory: str | os.PathLike[str]) -> list[str]:
        """Paths of the checkpoint directories in `directory`, sorted."""
        folder = Path(directory)
        if not folder.is_dir():
            return []
        names = {entry.name.removeprefix(REPLACED) for entry in folder.iterdir()}
        return sorted(str(folder / name) for name in names if not name.startswith(".") and self.exists(folder / name))

    def verify(self, path: str | os.PathLike[str]) -> None:
        """Read every byte and check it.

        Raises:
            CheckpointCorruptError: names the tensor and the damaged range; CheckpointNotFoundError: nothing is there.
        """
        self._engine.verify(path)

    def link(self, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> bool:
        """Give a checkpoint a second name, a directory of hard links; False where links cannot be made."""
        return self._engine.link(source, target)

    def probe(self, directory: str | os.PathLike[str]) -> int:
        """Write a small file where `directory` is or will be, and remove it. Returns the bytes that are free there.

        Raises:
            OSError: nothing can be written there.
        """
        return local.probe(directory)

    def wait(self) -> None:
        """Wait until nothing is under way; raise what failed."""
        self._engine.wait()

    def teardown(self) -> None:
        """Wait, give back threads and memory, raise what failed. Another run may follow."""
        self._engine.close()


def silent(key_path: str, value: Any) -> None:
    """Pickle without a word."""


def warn_of_pickle(key_path: str, value: Any) -> None:
    """Say what is pickled, and what that means."""
    kind = type(value)
    warnings.warn(
        f"The value at {key_path!r} is a {kind.__module__}.{kind.__qualname__}, which cannot be stored as data. The"
        " checkpoint is written with it pickled, and loads only with weights_only=False. Store plain values instead.",
        UserWarning,
        stacklevel=2,
    )


def moved(value: Any, map_location: Any) -> Any:
    """A copy of the containers, with every tensor where `map_location` says: a device, or a dict or function of them.

    A function, as `torch.load` takes it, is asked with the storage on the host.
    """
    if isinstance(value, torch.Tensor):
        if callable(map_location):
            storage = map_location(value.untyped_storage(), "cpu")
            return value if storage is None or storage.device.type == "cpu" else value.to(storage.device)
        return value.to(map_location.get("cpu", "cpu") if isinstance(map_location, dict) else map_location)
    if isinstance(value, dict):
        return type(value)((k, moved(v, map_location)) for k, v in value.items()) if type(value) in _PLAIN else value
    if type(value) in (list, tuple):
        return type(value)(moved(v, map_location) for v in value)
    return value


_PLAIN = (dict, OrderedDict)
