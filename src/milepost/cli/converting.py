"""Conversion between the forms. This command needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milepost.cli.progress import shown
from milepost.cli.reading import form_of, size_of
from milepost.errors import CheckpointFormatError, MisconfigurationException


def convert(
    source: Path, target: Path, *, unpickle: bool = False, quiet: bool = False, memory_bytes: int | None = None
) -> None:
    """Read `source`, verify it, and write it as `target`, whose ending says the form: ``.ckpt``, ``.safetensors``
    (weights only) or none (a directory).

    Args:
        memory_bytes: of a checkpoint directory, what its tensors may take in memory; a larger one is put together in a
            file beside `target`. None: half of what is free.

    Raises:
        CheckpointError: the source is damaged or unsafe, or the target cannot be written.
        MisconfigurationException: the target exists already, or has another ending.
    """
    if target.exists():
        raise MisconfigurationException(f"{target} exists already: give another target, or remove it first.")
    if target.suffix not in ("", ".safetensors", *_TORCH):
        raise MisconfigurationException(f"{target}: end it in .ckpt, .safetensors, or nothing for a directory.")
    # a file of torch is verified, and then read again by torch
    size = size_of(source) if source.exists() else 0
    with shown(f"reading {source}", size * (2 if form_of(source) == "ckpt" else 1), quiet=quiet):
        state = _read(source, unpickle, _spill(source, target, size, memory_bytes))
    with shown(f"writing {target}", size, quiet=quiet):
        _write(state, source, target)


_TORCH = (".ckpt", ".pt", ".pth")


def _write(state: dict[str, Any], source: Path, target: Path) -> None:
    if target.suffix == ".safetensors":
        _write_safetensors(_weights(state, source), target)
    elif target.suffix in _TORCH:
        from milepost.plugins.io.torch_io import TorchCheckpointIO

        TorchCheckpointIO().save_checkpoint(state, target)
    else:
        from milepost.engine.directory import DirectoryEngine

        engine = DirectoryEngine()
        engine.save(target, state, step=int(state.get("global_step", 0)), background=False)
        engine.close()


def _spill(source: Path, target: Path, size: int, memory_bytes: int | None) -> Path | None:
    """Where the tensors are put together, if they are more than may be in memory."""
    from milepost.engine.spill import free_memory_bytes

    if form_of(source) != "directory" or size <= (free_memory_bytes() // 2 if memory_bytes is None else memory_bytes):
        return None
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    return target.absolute().parent


def _read(source: Path, unpickle: bool, spill: Path | None) -> dict[str, Any]:
    form = form_of(source)
    if form == "directory":
        from milepost.engine.directory import DirectoryEngine

        engine = DirectoryEngine()
        try:
            return engine.load(source, unpickle=unpickle, spill=spill)
        finally:
            engine.close()
    if form == "safetensors":
        from milepost.plugins.io.safetensors_io import SafetensorsCheckpointIO

        return SafetensorsCheckpointIO().load_checkpoint(source, weights_only=False if unpickle else None)
    if form == "dcp":
        from milepost.integrations.dcp import load_distcp

        return load_distcp(source, unpickle=unpickle)
    from milepost.plugins.io.torch_io import TorchCheckpointIO

    return TorchCheckpointIO().load_checkpoint(source, weights_only=False if unpickle else None)


def _weights(state: dict[str, Any], source: Path) -> dict[str, Any]:
    """The flat dict of tensors that a checkpoint of a model holds: under ``state_dict`` or ``model``, or at the top."""
    import torch

    for candidate in (state.get("state_dict"), state.get("model"), state):
        if isinstance(candidate, dict):
            tensors = {str(k): v for k, v in candidate.items() if isinstance(v, torch.Tensor)}
            if tensors:
                return tensors
    raise CheckpointFormatError(f"{source} holds no weights under 'state_dict' or 'model', or at the top.")


def _write_safetensors(tensors: dict[str, Any], target: Path) -> None:
    from milepost.engine import safetensors_file
    from milepost.storage import local

    with local.replacing(target) as file:
        safetensors_file.write(tensors, {"format": "pt"}, file.fileno())
