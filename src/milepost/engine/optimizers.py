"""What a stored optimizer's state means for a live optimizer: whether it fits, and how it is taken."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from milepost.engine.locating import Located, Ref
from milepost.engine.shards import new_beside
from milepost.engine.spread import is_dtensor
from milepost.format.codec import PartsRef, TensorRef


def unfit(optimizer: Optimizer, tree: Any) -> str | None:
    """Why an optimizer cannot take a stored state, None where it can: as many parameters, of the same kind."""
    groups = _groups(tree)
    if groups is None:
        return "what is stored there is not the state of an optimizer"
    saved, live = ([len(g["params"]) for g in each] for each in (groups, optimizer.param_groups))
    if saved != live:
        return f"it holds groups of {saved} parameters, the optimizer has {live}: build it over the same parameters"
    for stored, group in zip(groups, optimizer.param_groups, strict=True):
        theirs, ours = set(stored) - set(group), set(group) - set(stored)
        if theirs and ours:  # one side alone: another version of torch, or a scheduler's own entry
            return (
                f"it is of another optimizer: its settings {sorted(map(str, theirs))} are unknown here, and"
                f" {sorted(map(str, ours))} are not in it"
            )
    return None


def _groups(tree: Any) -> list[dict[str, Any]] | None:
    """The groups of a stored optimizer, in the form that the rest relies on."""
    groups = tree.get("param_groups") if isinstance(tree, dict) else None
    if not isinstance(groups, list) or not isinstance(tree.get("state"), dict):
        return None
    for group in groups:
        numbers = group.get("params") if isinstance(group, dict) else None
        if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
            return None
    return groups


def _by_number(optimizer: Optimizer, tree: Any) -> dict[int, torch.Tensor]:
    """The live parameter for each stored number."""
    numbers = [n for group in tree["param_groups"] for n in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return dict(zip(numbers, parameters, strict=True))


def without(optimizer: Optimizer, tree: Any, fresh: Container[int]) -> tuple[Any, list[int]]:
    """The stored state without that of parameters that begin anew; and the numbers of these.

    Args:
        fresh: ids of parameters.
    """
    left = [n for n, p in _by_number(optimizer, tree).items() if id(p) in fresh and n in tree["state"]]
    if not left:
        return tree, []
    return {**tree, "state": {n: item for n, item in tree["state"].items() if n not in left}}, left


def new_shards(
    optimizer: Optimizer, tree: Any, known: Collection[Ref], located: Located
) -> Iterator[tuple[Ref, torch.Tensor]]:
    """New memory for state that the optimizer has not yet, of parameters that are DTensors: sharded as they are.

    It has the stored type, which need not be the parameter's. Everything else is read whole, as it is on every rank.
    """
    parameters = _by_number(optimizer, tree)
    for number, item in tree["state"].items():
        parameter = parameters.get(number)
        if parameter is None or not is_dtensor(parameter) or not isinstance(item, dict):
            continue
        for ref in item.values():
            if isinstance(ref, (TensorRef, PartsRef)) and ref not in known:
                dtype, shape = located.type_of(ref)
                if shape == tuple(parameter.shape):
                    yield ref, new_beside(parameter, dtype)


def give(optimizer: Optimizer, made: dict[str, Any]) -> None:
    """As `Optimizer.load_state_dict`, which would cast moments to the type of the parameters and copy them."""
    by_number = _by_number(optimizer, made)
    state: dict[Any, Any] = {}
    for number, item in made["state"].items():
        parameter = by_number.get(number)
        state[number if parameter is None else parameter] = (
            {name: _beside(parameter, name, v) for name, v in item.items()} if isinstance(item, dict) else item
        )
    groups = [
        {**group, **saved, "params": group["params"]}
        for saved, group in zip(made["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.__setstate__({"state": state, "param_groups": groups})


def _beside(parameter: torch.Tensor | None, name: str, value: Any) -> Any:
    """Moments live where their parameter does; step counts stay on the host, as torch keeps them."""
    if parameter is None or not isinstance(value, torch.Tensor) or name == "step":
        return value
    return value.to(parameter.device)
