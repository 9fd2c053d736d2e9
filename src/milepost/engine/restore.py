"""Putting a stored state back into live objects, in place: into the tensors that are there, by one pass over the bytes.

All is checked before anything is touched: keys, types, shapes; then pieces are read, verified and copied.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from milepost.engine.directory import DirectoryEngine
from milepost.engine.reader import StoredCheckpoint
from milepost.engine.state import rebuild, references, stored_type
from milepost.errors import ResumeError
from milepost.format.codec import TensorRef

_MODULE_LOAD = nn.Module.load_state_dict


def collect(state: Mapping[str, Any]) -> dict[str, Any]:
    """What is saved of `state`: for an object with `state_dict` that, else the value itself."""
    return {key: value.state_dict() if _stateful(value) else value for key, value in state.items()}


def restore(engine: DirectoryEngine, stored: StoredCheckpoint, state: MutableMapping[str, Any]) -> None:
    """Put `stored` into `state`.

    Modules, optimizers and nested containers take the tensors into their own memory; other objects get a new state
    through `load_state_dict`; plain values in `state` are replaced.

    Raises:
        ResumeError: something of `state` is not in the checkpoint, or has another shape or type. Nothing was touched.
        CheckpointCorruptError: a piece is damaged. What was read before it has been overwritten: restore from another
            checkpoint, which overwrites it all, before going on.
    """
    tree = stored.tree
    if missing := sorted(set(state) - set(tree)):
        raise ResumeError(
            f"{stored.path} has nothing under {missing}; it holds {sorted(tree)}. Give restore the keys that save was"
            " given."
        )
    live: dict[TensorRef, torch.Tensor] = {}
    for key, value in state.items():
        _check_names(stored, tree[key], value, key)
        _match(stored, tree[key], _live_tree(value), key, live, strict=isinstance(value, nn.Module))
    wanted = references({key: tree[key] for key in state})
    direct = {ref: tensor for ref, tensor in live.items() if _takes_bytes(stored, ref, tensor)}
    tensors = engine.read_tensors(stored, wanted, direct)
    for ref, tensor in live.items():
        if ref not in direct:
            with torch.no_grad():
                tensor.copy_(tensors[ref])
    for key, value in sorted(state.items(), key=lambda item: bool(getattr(item[1], "restored_last", False))):
        made = rebuild(tree[key], lambda ref: live.get(ref, tensors[ref]))
        state[key] = _give(value, made)


def _stateful(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _live_tree(value: Any) -> Any:
    """The nested state whose tensors can be written in place; None for what takes a new state."""
    if isinstance(value, nn.Module):
        return value.state_dict()
    if isinstance(value, Optimizer):
        return value.state_dict()
    if isinstance(value, (dict, list, tuple, torch.Tensor)):
        return value
    return None


def _check_names(stored: StoredCheckpoint, tree: Any, value: Any, key: str) -> None:
    """A module must find each of its names, an optimizer as many parameters as it has."""
    if isinstance(value, nn.Module):
        present, saved = set(value.state_dict()), set(tree) if isinstance(tree, dict) else set()
        if present != saved:
            raise ResumeError(
                f"{stored.path} does not fit {type(value).__name__} under {key!r}: it lacks"
                f" {sorted(present - saved)}, and holds {sorted(saved - present)}, which the module has not. Build the"
                " model as it was when it was saved."
            )
    if isinstance(value, Optimizer):
        saved_counts = [len(group["params"]) for group in _optimizer_groups(stored, tree, key)]
        counts = [len(group["params"]) for group in value.param_groups]
        if saved_counts != counts:
            raise ResumeError(
                f"{stored.path} holds under {key!r} an optimizer whose groups have {saved_counts} parameters,"
                f" {type(value).__name__} has {counts}: build it over the same parameters."
            )


def _optimizer_groups(stored: StoredCheckpoint, tree: Any, key: str) -> list[dict[str, Any]]:
    """The groups of a stored optimizer, in the form that `_give_optimizer` relies on."""
    groups = tree.get("param_groups") if isinstance(tree, dict) else None
    numbers = [g.get("params") for g in groups if isinstance(g, dict)] if isinstance(groups, list) else None
    if (
        groups is None
        or numbers is None
        or len(numbers) != len(groups)
        or not isinstance(tree.get("state"), dict)
        or not all(isinstance(each, list) and all(type(n) is int for n in each) for each in numbers)
    ):
        raise ResumeError(f"What {stored.path} holds under {key!r} is not the state of an optimizer.")
    return list(groups)


def _match(
    stored: StoredCheckpoint, tree: Any, value: Any, path: str, found: dict[TensorRef, torch.Tensor], *, strict: bool
) -> None:
    """Find for each stored tensor the live one with the same key path; where `strict`, it must fit."""
    if isinstance(tree, TensorRef):
        if isinstance(value, torch.Tensor) and _fits(stored, tree, value, path, strict):
            found.setdefault(tree, value.detach())
        return
    if isinstance(tree, dict) and isinstance(value, Mapping):
        for key, inner in tree.items():
            _match(stored, inner, value.get(key), f"{path}.{key}", found, strict=strict)
    elif isinstance(tree, (list, tuple)) and isinstance(value, (list, tuple)):
        for number, (inner, item) in enumerate(zip(tree, value, strict=False)):
            _match(stored, inner, item, f"{path}.{number}", found, strict=strict)


def _fits(stored: StoredCheckpoint, ref: TensorRef, tensor: torch.Tensor, path: str, strict: bool) -> bool:
    dtype, shape = stored_type(stored.index(ref.blob), ref.row)
    if (tuple(tensor.shape), tensor.dtype) == (shape, dtype):
        return True
    if strict:
        raise ResumeError(
            f"{path}: {stored.path} holds {dtype} of shape {list(shape)}, the live tensor is {tensor.dtype} of shape"
            f" {list(tensor.shape)}. Build the model as it was when it was saved."
        )
    return False


def _takes_bytes(stored: StoredCheckpoint, ref: TensorRef, tensor: torch.Tensor) -> bool:
    """Whether the bytes can be copied straight into the tensor's memory."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and type(tensor) in (torch.Tensor, nn.Parameter)


def _give(value: Any, made: Any) -> Any:
    """Hand the rebuilt state to `value`; returns what then stands under its key."""
    if isinstance(value, nn.Module):
        _give_module(value, made)
        return value
    if isinstance(value, Optimizer) and type(value).load_state_dict is Optimizer.load_state_dict:
        try:
            _give_optimizer(value, made)
        except Exception as error:  # its own code meets what the file holds
            raise ResumeError(f"{type(value).__name__} does not take its stored state: {error!r}.") from error
        return value
    if _stateful(value):
        value.load_state_dict(made)
        return value
    if isinstance(value, dict) and isinstance(made, dict):
        value.clear()
        value.update(made)
        return value
    return made


def _give_module(module: nn.Module, made: dict[str, Any]) -> None:
    """The tensors are in place already; what is no tensor is loaded by the module itself."""
    plain = all(isinstance(item, torch.Tensor) for item in made.values())
    if not plain or type(module).load_state_dict is not _MODULE_LOAD:
        module.load_state_dict(made)


def _give_optimizer(optimizer: Optimizer, made: dict[str, Any]) -> None:
    """As `Optimizer.load_state_dict`, which would cast moments to the type of the parameters and copy them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in made["param_groups"] for n in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=True))
    state: dict[Any, Any] = {}
    for number, item in made["state"].items():
        parameter = by_number.get(number)
        state[number if parameter is None else parameter] = (
            {name: _beside(parameter, name, v) for name, v in item.items()} if isinstance(item, dict) else item
        )
    groups = [
        {**saved, "params": group["params"]}
        for saved, group in zip(made["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.__setstate__({"state": state, "param_groups": groups})


def _beside(parameter: torch.Tensor | None, name: str, value: Any) -> Any:
    """Moments live where their parameter does; step counts stay on the host, as torch keeps them."""
    if parameter is None or not isinstance(value, torch.Tensor) or name == "step":
        return value
    return value.to(parameter.device)
