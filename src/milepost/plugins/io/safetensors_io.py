"""Checkpoints as one safetensors file of the weights that every tool reads, and all else beside it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import torch

from milepost.engine import safetensors_file
from milepost.engine.directory import DirectoryEngine
from milepost.engine.safetensors_file import SafetensorsFile
from milepost.errors import CheckpointCorruptError, CheckpointNotFoundError
from milepost.plugins.io.checkpoint_io import CheckpointIO, refuse_storage_options
from milepost.plugins.io.snapshot_io import moved, silent, warn_of_pickle
from milepost.storage import local

_REST = "milepost.rest"
_MARK = ".rest-"


class SafetensorsCheckpointIO(CheckpointIO):
    """`path` is a safetensors file of ``state_dict``; a directory ``<path>.rest-…`` beside it holds everything else.

    The file's header names its directory, so that the two belong together: the file is put in its place last, in one
    step. A safetensors file that others wrote loads too, as ``{"state_dict": …}``. Give `ModelCheckpoint` the ending
    with ``FILE_EXTENSION = ".safetensors"``.

    Args:
        threads: that copy, digest and write.
        allow_pickle: as for `SnapshotCheckpointIO`.
    """

    def __init__(self, *, threads: int = 2, allow_pickle: bool = False) -> None:
        self._threads = threads
        self._allow_pickle = allow_pickle
        self._engine = DirectoryEngine(threads=threads)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write both; when this returns they are durable.

        Raises:
            CheckpointSaveError: they are not; what was at `path` before is intact.
            TypeError: `storage_options` was given.
        """
        refuse_storage_options(self, storage_options)
        path = Path(os.path.abspath(path))  # noqa: PTH100  # not resolved: a link at the target is replaced
        weights = {k: v for k, v in checkpoint.get("state_dict", {}).items() if isinstance(v, torch.Tensor)}
        others = {k: v for k, v in checkpoint.get("state_dict", {}).items() if k not in weights}
        rest = path.with_name(f"{path.name}{_MARK}{secrets.token_hex(4)}")
        step = checkpoint.get("global_step", 0)
        with local.replacing(path, step=step) as file:
            digests, tied = safetensors_file.write(
                weights, {"format": "pt", _REST: rest.name}, file.fileno(), self._threads
            )
            state = {
                "checkpoint": {k: None if k == "state_dict" else v for k, v in checkpoint.items()},
                "weights": {"digests": digests, "tied": tied, "order": list(checkpoint.get("state_dict", {}))},
                "others": others,
            }
            warn = silent if self._allow_pickle else warn_of_pickle
            self._engine.save(rest, state, step=step, background=False, pickled=warn)
        self._sweep(path, keep=rest.name)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load and verify; tensors go to the CPU unless `map_location` says otherwise.

        Raises:
            CheckpointNotFoundError, CheckpointCorruptError, UnsafeCheckpointError, CheckpointFormatError
        """
        file = self._open(path)
        rest = self._rest(file)
        if rest is None:
            checkpoint: dict[str, Any] = {"state_dict": file.read()}
        else:
            state = self._engine.load(rest, unpickle=weights_only is False)
            file.verify(state["weights"]["digests"])
            found = {**file.read(), **state["others"]}
            tied = state["weights"]["tied"]
            checkpoint = dict(state["checkpoint"])
            if "state_dict" in checkpoint:
                checkpoint["state_dict"] = {name: found[tied.get(name, name)] for name in state["weights"]["order"]}
        return checkpoint if map_location is None else moved(checkpoint, map_location)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove both; where there is none, do nothing."""
        local.remove(path)
        self._sweep(Path(os.path.abspath(path)), keep=None)  # noqa: PTH100

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return Path(path).is_file()

    def list(self, directory: str | os.PathLike[str]) -> list[str]:
        """Paths of the files in `directory` that have a rest, or end in ``.safetensors``, sorted."""
        folder = Path(directory)
        if not folder.is_dir():
            return []
        owners = {p.name.rpartition(_MARK)[0] for p in folder.iterdir() if _MARK in p.name}
        files = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        return sorted(str(p) for p in files if p.name in owners or p.suffix == ".safetensors")

    def verify(self, path: str | os.PathLike[str]) -> str | None:
        """Read every byte of both and check it. Returns ``"cannot"`` for a file that others wrote: it has no digests.

        Raises:
            CheckpointCorruptError: names the tensor and the damaged range; CheckpointNotFoundError: nothing is there.
        """
        file = self._open(path)
        rest = self._rest(file)
        if rest is None:
            return "cannot"
        self._engine.verify(rest)
        with self._engine.open(rest) as stored:  # the values alone: its tensors have just been read
            file.verify(stored.tree["weights"]["digests"])
        return None

    def check(self, checkpoint: dict[str, Any]) -> None:
        """Find what a save could only pickle; nothing is written. Raises UnencodableValueError."""
        if not self._allow_pickle:
            self._engine.check(checkpoint)

    def probe(self, directory: str | os.PathLike[str]) -> int:
        """Write a small file where `directory` is or will be, and remove it. Returns the bytes that are free there."""
        return local.probe(directory)

    def teardown(self) -> None:
        """Give back threads and memory. Another run may follow."""
        self._engine.close()

    def _open(self, path: str | os.PathLike[str]) -> SafetensorsFile:
        if not Path(path).is_file():
            raise CheckpointNotFoundError(f"Checkpoint file not found: {path}")
        return SafetensorsFile(Path(os.path.abspath(path)))  # noqa: PTH100

    def _rest(self, file: SafetensorsFile) -> Path | None:
        name = file.metadata.get(_REST)
        if name is None:
            return None
        if Path(name).name != name or _MARK not in name or not (file.path.parent / name).is_dir():
            raise CheckpointCorruptError(
                f"{file.path} names {name!r} as the directory of all that is no weight, which is not there beside it."
                " Move the two together.",
                path=str(file.path),
            )
        return file.path.parent / name

    def _sweep(self, path: Path, keep: str | None) -> None:
        """Remove the rests of earlier files at `path`."""
        for stale in path.parent.glob(f"{_escaped(path.name)}{_MARK}*"):
            if stale.name != keep:
                self._engine.remove(stale)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "[]*?" else c for c in name)
