"""Checkpoints as torch's own zip files: atomic, durable, verified, and loaded without running code."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO, Any

import torch

from milepost.engine import torch_file, values
from milepost.errors import CheckpointFormatError, CheckpointNotFoundError, UnsafeCheckpointError
from milepost.format import sealed, torch_zip
from milepost.plugins.io import foreign_pickle
from milepost.plugins.io.checkpoint_io import CheckpointIO, refuse_storage_options
from milepost.storage import local


class TorchCheckpointIO(CheckpointIO):
    """One ``.ckpt`` file that ``torch.load`` reads and Lightning resumes from.

    A file appears under its name only when it is whole and on the disk; its bytes are covered by digests that `verify`
    and `load_checkpoint` check. Loading runs no code unless ``weights_only=False`` is given.

    Args:
        allow_pickle: pickle what cannot be stored as data, without a word. Such a file loads only with
            ``weights_only=False``. Otherwise `check` refuses such a value before training, and one that turns up
            later is pickled with a warning, so that no step is lost for it.
    """

    _allow_pickle = False  # for a subclass whose __init__ does not call this one: Lightning's has none to call

    def __init__(self, *, allow_pickle: bool = False) -> None:
        self._allow_pickle = allow_pickle

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write `checkpoint`; when this returns it is durable.

        Raises:
            CheckpointSaveError: it is not; what was at `path` before is intact.
            TypeError: `storage_options` was given.
        """
        refuse_storage_options(self, storage_options)
        step = checkpoint.get("global_step") if isinstance(checkpoint, dict) else None
        with local.replacing(path, step=step) as file:
            plain = values.to_plain(checkpoint, warn=not self._allow_pickle)
            self._write(plain, file)

    def _write(self, plain: dict[str, Any], file: IO[bytes]) -> None:
        """Write a sealed archive into the empty `file`."""
        image = torch_file.image_of(plain)
        if image is None:
            sealed.write(file, lambda out: torch.save(plain, out))
        else:
            torch_file.write(image, file.fileno())

    def check(self, checkpoint: dict[str, Any]) -> None:
        """Find what a save could only pickle; nothing is written.

        Raises:
            UnencodableValueError: names the value's key path, and how to go on.
        """
        if not self._allow_pickle:
            values.check(
                checkpoint,
                remedy=" To have it pickled all the same, give"
                f" Trainer(plugins={type(self).__name__}(allow_pickle=True)); such files load only with"
                " weights_only=False, which runs code.",
            )

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None, *, mapped: bool = False
    ) -> dict[str, Any]:
        """Verify the file and load it; tensors go to the CPU unless `map_location` says otherwise.

        Args:
            mapped: large tensors are not read, but mapped from the file: a part of one is read where it is used.
            path: the file, or an open one. One that stands at its beginning and can be read twice is verified too.

        Raises:
            CheckpointNotFoundError, CheckpointCorruptError, UnsafeCheckpointError, CheckpointFormatError
        """
        if hasattr(path, "read"):
            if _can_seek(path):
                sealed.verify(path, "<stream>")
                path.seek(0)
            return _load(path, "<stream>", map_location, weights_only)
        path = Path(path)
        if not path.is_file():
            raise CheckpointNotFoundError(f"Checkpoint file not found: {path}")
        with path.open("rb") as file:
            sealed.verify(file, str(path))
            file.seek(0)
            if mapped and map_location is None and sys.platform == "linux":
                loaded: dict[str, Any] = _without_small_maps(_load(file, str(path), None, weights_only, mapped=True))
                return loaded
            return _load(file, str(path), map_location, weights_only)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete the file durably; where there is none, do nothing."""
        local.remove(path)

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return Path(path).is_file()

    def list(self, directory: str | os.PathLike[str]) -> list[str]:
        """Paths of the ``.ckpt`` files in `directory`, sorted."""
        folder = Path(directory)
        return sorted(str(p) for p in folder.glob("*.ckpt") if p.is_file()) if folder.is_dir() else []

    def verify(self, path: str | os.PathLike[str]) -> str | None:
        """Read every byte and check it. Returns ``"cannot"`` for a file without checksums, of torch before 1.6.

        Raises:
            CheckpointCorruptError: names the damaged range; CheckpointNotFoundError: no such file.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointNotFoundError(f"Checkpoint file not found: {path}")
        with path.open("rb") as file:
            return None if sealed.verify(file, str(path)) else "cannot"

    def probe(self, directory: str | os.PathLike[str]) -> int:
        """Write a small file where `directory` is or will be, and remove it. Returns the bytes that are free there.

        Raises:
            OSError: nothing can be written there.
        """
        return local.probe(directory)

    def link(self, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> bool:
        """Give the file a second name, atomically; False where the file system has no hard links."""
        return local.link(source, target)


def _can_seek(file: Any) -> bool:
    """Whether `file` stands at its beginning and can be brought back there."""
    try:
        return bool(file.seekable()) and file.tell() == 0
    except (AttributeError, OSError):
        return False


def _without_small_maps(value: Any) -> Any:
    """`value` with small tensors in memory of their own: they may be kept for longer than the file."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.nbytes <= _MAPPED_BYTES else value
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = _without_small_maps(item)
        return value
    if type(value) in (list, tuple):
        return type(value)(map(_without_small_maps, value))
    return value


_MAPPED_BYTES = 2**16


def _load(
    file: Any, name: str, map_location: Any, weights_only: bool | None, *, mapped: bool = False
) -> dict[str, Any]:
    safe = weights_only is not False
    try:
        unpickler = None if safe else foreign_pickle
        source: Any = f"/proc/self/fd/{file.fileno()}" if mapped else file  # the very file that was verified
        loaded = torch.load(
            source, map_location=map_location or "cpu", pickle_module=unpickler, weights_only=safe, mmap=mapped
        )
    except Exception as error:
        file.seek(0)
        if safe and (refused := torch_zip.refused_value(file)):
            key_path, type_name = refused
            raise UnsafeCheckpointError(
                f"{name}: the value at {key_path!r} is a pickled {type_name}, and loading it would run code. If you"
                " trust the file, load it with weights_only=False.",
                path=name,
                key_path=key_path,
            ) from error
        raise CheckpointFormatError(f"{name} is no checkpoint that torch can load: {error}") from error
    return values.from_plain(loaded) if isinstance(loaded, dict) else loaded
