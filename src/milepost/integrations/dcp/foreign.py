"""Reading what torch.distributed.checkpoint itself, or Lightning through it, has saved. No code of a file is run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from milepost.errors import CheckpointFormatError, UnsafeCheckpointError
from milepost.format import distcp, torch_zip
from milepost.format.distcp_files import DistcpFiles
from milepost.integrations.dcp.nesting import nest
from milepost.plugins.io import TorchCheckpointIO

_WEIGHTS = ("state_dict", "model")  # as Lightning's ModelParallelStrategy and its FSDPStrategy name them
_OPTIMIZER = "optimizer_"


def load_distcp(path: str | os.PathLike[str], *, unpickle: bool = False) -> dict[str, Any]:
    """A checkpoint of DCP as one nested state, its tensors whole. One of Lightning's gets the keys of a ``.ckpt``.

    All keys of dicts are text, as DCP keeps them.

    Args:
        unpickle: whether to load values that are pickled, which runs code that the file names.

    Raises:
        CheckpointError: it is not there, damaged, or holds a pickled value and `unpickle` is False.
    """
    with DistcpFiles(path) as files:
        found = files.metadata
        flat = {key: tensor_of(files, key) for key in found.tensors}
        flat |= {key: value_of(files, key, unpickle=unpickle) for key in found.values}
        state = nest((found.paths.get(key, (key,)), value) for key, value in flat.items())
    rest = Path(path) / distcp.LIGHTNING_NAME
    if not rest.is_file():
        return state
    return _as_lightning(state, TorchCheckpointIO().load_checkpoint(rest, weights_only=False if unpickle else None))


def tensor_of(files: DistcpFiles, key: str) -> torch.Tensor:
    """A tensor of the checkpoint, whole, in new memory."""
    described, array = files.metadata.tensors[key], files.tensor(key)
    return as_tensor(array, described.dtype)


def as_tensor(array: Any, dtype: str) -> torch.Tensor:
    """The elements of `array`, bytes without a type, as torch's type `dtype`. The memory is shared where it can be."""
    kind = getattr(torch, dtype)
    if not array.size:
        return torch.empty(array.shape, dtype=kind)
    if not array.flags.c_contiguous or not array.flags.writeable:
        array = array.copy(order="C")
    return torch.frombuffer(array.reshape(-1).view("u1"), dtype=kind).reshape(array.shape)


def value_of(files: DistcpFiles, key: str, *, unpickle: bool = False) -> Any:
    """A value that is no tensor.

    Raises:
        UnsafeCheckpointError: it is pickled, and `unpickle` is False.
    """
    opened = files.value(key)
    try:
        return torch.load(opened, map_location="cpu", weights_only=not unpickle)  # type: ignore[arg-type]
    except Exception as error:
        opened.seek(0)
        refused = None if unpickle else torch_zip.refused_value(opened)
        if refused is None:
            raise CheckpointFormatError(f"{files.path}: {key!r} is nothing that torch can load: {error}") from error
        inner, name = refused
        where = f"{key}.{inner}" if inner else key
        raise UnsafeCheckpointError(
            f"{files.path}: the value at {where!r} is a pickled {name}, and loading it would run code. If you trust the"
            " checkpoint, ask for that: unpickle=True, or --unpickle on the command line.",
            path=str(files.path),
            key_path=where,
        ) from error


def _as_lightning(state: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """The dict that Lightning has in a ``.ckpt``, from the parts that it saves sharded."""
    weights = next((key for key in _WEIGHTS if key in state), None)
    made = {**rest, **({} if weights is None else {"state_dict": state.pop(weights)})}
    optimizers = [key for key in (f"{_OPTIMIZER}{n}" for n in range(len(state))) if key in state]
    made["optimizer_states"] = [_numbered(state.pop(key)) for key in optimizers]
    return {**made, **state}


def _numbered(optimizer: Any) -> Any:
    """An optimizer's state by the numbers of the parameters, as torch's optimizers take it: FSDP has names there."""
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    if not isinstance(groups, list) or not all(
        isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups
    ):
        return optimizer
    names = [str(name) for group in groups for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    if len(numbers) != len(names):
        return optimizer
    renamed = [{**group, "params": [numbers[str(name)] for name in group["params"]]} for group in groups]
    moments = {numbers.get(str(name), name): value for name, value in optimizer.get("state", {}).items()}
    return {**optimizer, "state": moments, "param_groups": renamed}
