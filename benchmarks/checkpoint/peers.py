"""The others: torch.save, safetensors, DCP and Lightning, each until the bytes are durable."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def fsync(path: Path) -> None:
    for file in [*path.rglob("*"), path] if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def flat(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{prefix}.{key}").items()}
    return {}


def save_torch(state: Any, path: Path) -> None:
    torch.save(state, path)
    fsync(path)


def save_safetensors(state: Any, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(flat(state), path)
    fsync(path)


def save_dcp(state: Any, path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(state, storage_writer=dcp.FileSystemWriter(path, sync_files=True), no_dist=True)


def save_lightning(state: Any, path: Path) -> None:
    from pytorch_lightning.plugins.io import TorchCheckpointIO

    TorchCheckpointIO().save_checkpoint(state, path)
    fsync(path)


SYNCHRONOUS: dict[str, Callable[[Any, Path], None]] = {
    "safetensors + fsync": save_safetensors,
    "torch.save + fsync": save_torch,
    "DCP save": save_dcp,
    "Lightning TorchCheckpointIO + fsync": save_lightning,
}

Begun = Callable[[], None]
"""Waits until what was begun is durable."""


def begin_dcp(state: Any, path: Path) -> Begun:
    import torch.distributed.checkpoint as dcp

    writer = dcp.FileSystemWriter(path, sync_files=True)
    future: Any = dcp.async_save(state, storage_writer=writer, no_dist=True)
    return lambda: future.result()


def begin_lightning(state: Any, path: Path) -> Begun:
    from pytorch_lightning.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

    plugin = AsyncCheckpointIO(TorchCheckpointIO())
    plugin.save_checkpoint(state, path)

    def wait() -> None:
        plugin.teardown()
        fsync(path)

    return wait


IN_BACKGROUND: dict[str, Callable[[Any, Path], Begun]] = {
    "DCP async_save": begin_dcp,
    "Lightning AsyncCheckpointIO + fsync": begin_lightning,
}
