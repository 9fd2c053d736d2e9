"""From the parts that DeepSpeed's ZeRO has written to a checkpoint as one device has it. Needs no DeepSpeed.

ZeRO flattens the parameters of a group into one vector of fp32 and gives each rank a piece of it, with the moments of
the optimizer beside. Stages 1 and 2 cut the vector into one piece per rank; stage 3 cuts every parameter, and each
rank's vector strings its pieces together. Padding fills the last piece. The names and shapes, in the order of the
vector, stand in the model's part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from milepost.errors import CheckpointFormatError
from milepost.plugins.io import parts

KIND = "deepspeed"
LAYOUT = "deepspeed"
"""The record's key for what DeepSpeed does not store: the optimizer's parameters by name, group by group."""
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt$")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
Load = Callable[[str], dict[str, Any]]
Vector = dict[str, torch.Tensor]
"""Pieces of one parameter: under "" of its master weights, under other names of the optimizer's state."""


def whole(io: Any, path: Any, weights_only: bool | None = None) -> dict[str, Any]:
    """The checkpoint in parts at `path` as a single device would have saved it: full weights and moments, in fp32.

    Raises:
        CheckpointFormatError: parts of a kind, or in a layout, that cannot be put together.
        CheckpointError: what loading a part raises.
    """
    record, found = parts.read(io, path, weights_only)
    if found.kind != KIND:
        raise CheckpointFormatError(f"{path}: parts of the kind {found.kind!r}, which this version does not know.")

    def load(name: str) -> dict[str, Any]:
        return parts.load(io, parts.part_path(path, found.tag, name), weights_only)

    layout = record.pop(LAYOUT, {})
    weights, optimizer = consolidated(found.names, load, layout, str(path))
    return {**record, "state_dict": weights, "optimizer_states": [] if optimizer is None else [optimizer]}


def consolidated(
    names: tuple[str, ...], load: Load, layout: Mapping[str, Any], path: str
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Full weights by name, and the optimizer's state dict as torch has it, from the parts `names`.

    Args:
        load: gives the part of a name. Each is asked for once; the optimizer's one after the other.
        layout: ``{"groups": [[name, ...], ...]}``, the optimizer's parameters. Without it the state dict numbers those
            that were trained only.
        path: for errors.
    """
    models = _by_rank(names, _MODEL, path)
    shards = _by_rank(names, _OPTIMIZER, path)
    if not models:
        raise CheckpointFormatError(f"{path}: DeepSpeed's checkpoint has no part with the model's state, only {names}.")
    model = load(models[0])
    if not shards:
        return _of_stage_0(model, layout, path)
    others = [load(name) for name in models[1:]]
    merge = _ThirdStage if len(others) == len(shards) - 1 and len(shards) == len(models) else _FlatStages
    if len(models) == 1 and len(shards) == 1:
        merge = _ThirdStage if models[0].startswith("zero_pp_rank") else _FlatStages
    merged = merge(model, path)
    for name in shards:
        merged.add(load(name)["optimizer_state_dict"])
    vectors = merged.vectors()
    weights = _weights([model, *others], vectors)
    return weights, _optimizer_state(merged.groups, vectors, layout.get("groups"))


def _by_rank(names: tuple[str, ...], pattern: re.Pattern[str], path: str) -> list[str]:
    found: dict[int, str] = {}
    for name in names:
        if match := pattern.match(name):
            if int(match[2]) != 0:
                raise CheckpointFormatError(
                    f"{path}: the part {name!r} is of a tensor- or pipeline-parallel run, which only DeepSpeed itself"
                    " can load. Load it with DeepSpeedStrategy at the layout it was saved at."
                )
            found[int(match[1] or 0)] = name
    return [found[rank] for rank in sorted(found)]


@dataclass
class _Group:
    """One of the optimizer's groups: its options, and its parameters in the order of the vector."""

    options: dict[str, Any]
    names: list[str]


class _Stages:
    """Takes up the ranks' shards in order."""

    def __init__(self, model: dict[str, Any], path: str) -> None:
        self.shapes: list[dict[str, Any]] = model["param_shapes"]
        self.path = path
        self.groups: list[_Group] = []
        self._ranks: list[list[Vector]] = []
        self._whole: list[dict[str, Any]] = []  # what the state holds beside vectors, such as the count of steps

    def _take(self, masters: list[torch.Tensor], states: Mapping[Any, Mapping[str, Any]]) -> None:
        vectors, self._whole = [], []
        for number, master in enumerate(masters):
            state = states.get(number, {})
            pieces = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim() > 0}
            vectors.append({"": master, **{k: v.flatten()[: master.numel()] for k, v in pieces.items()}})
            self._whole.append({k: v for k, v in state.items() if k not in pieces})
        self._ranks.append(vectors)


class _FlatStages(_Stages):
    """Stages 1 and 2."""

    def add(self, shard: dict[str, Any]) -> None:
        base = shard["base_optimizer_state"]
        if not isinstance(base, Mapping):
            raise CheckpointFormatError(
                f"{self.path} was saved with zero_optimization.elastic_checkpoint, which drops the optimizer's options."
                " Only DeepSpeed itself can load it; save without it."
            )
        self._paddings = shard.get("param_alignment_paddings")
        self._take(shard["single_partition_of_fp32_groups"], base["state"])
        self.groups = [
            _Group(_options(group), list(shapes))
            for group, shapes in zip(base["param_groups"], self.shapes, strict=True)
        ]

    def vectors(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for number, shapes in enumerate(self.shapes):
            flat = {key: torch.cat([rank[number][key] for rank in self._ranks]) for key in self._ranks[0][number]}
            paddings = self._paddings[number] if self._paddings else [0] * len(shapes)
            start = 0
            for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
                size = math.prod(shape)
                cut = {key: v[start : start + size].view(tuple(shape)).clone() for key, v in flat.items()}
                found[name] = {**self._whole[number], **cut}
                start += size + padding
        return found


class _ThirdStage(_Stages):
    """Stage 3."""

    def add(self, shard: dict[str, Any]) -> None:
        optimizer = shard["optimizer_state_dict"]
        self._take(shard["fp32_flat_groups"], optimizer["state"])
        self.groups = [
            _Group(_options(group), [name for number in group["params"] for name in self.shapes[number]])
            for group in optimizer["param_groups"]
        ]

    def vectors(self) -> dict[str, dict[str, Any]]:
        ranks = len(self._ranks)
        found: dict[str, dict[str, Any]] = {}
        for number, shapes in enumerate(self.shapes):
            start = 0
            for name, shape in shapes.items():
                size = math.prod(shape)
                piece = math.ceil(size / ranks)
                cut = {
                    key: torch.cat([rank[number][key][start : start + piece] for rank in self._ranks])[:size]
                    for key in self._ranks[0][number]
                }
                found[name] = {**self._whole[number], **{k: v.view(tuple(shape)) for k, v in cut.items()}}
                start += piece
        return found


def _weights(models: list[dict[str, Any]], vectors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All of the module's state dict, in its order."""
    model = models[0]
    frozen = model.get("frozen_param_shapes") or {}
    shared = model.get("shared_params") or {}
    weights: dict[str, Any] = type(model["module"])()
    for name, value in model["module"].items():
        owner = shared.get(name, name)
        if owner in vectors:
            weights[name] = vectors[owner][""]
        elif owner in frozen and value.numel() != math.prod(frozen[owner]):  # stage 3 has cut it
            pieces = torch.cat([m["frozen_param_fragments"][owner].flatten() for m in models])
            weights[name] = pieces[: math.prod(frozen[owner])].view(tuple(frozen[owner]))
        else:
            weights[name] = value
    return weights


def _optimizer_state(
    groups: list[_Group], vectors: dict[str, dict[str, Any]], layout: list[list[str]] | None
) -> dict[str, Any]:
    """As the optimizer's own `state_dict`: parameters by number, those that were not trained included by `layout`."""
    names = [group.names for group in groups] if layout is None else layout
    numbers = {name: n for n, name in enumerate(name for group in names for name in group)}
    state = {
        number: {key: _copied(value) for key, value in vectors[name].items() if key != ""}
        for name, number in numbers.items()
        if name in vectors and len(vectors[name]) > 1
    }
    described = [
        {**group.options, "params": [numbers[name] for name in members]}
        for group, members in zip(groups, names, strict=True)
    ]
    return {"state": state, "param_groups": described}


def _of_stage_0(
    model: dict[str, Any], layout: Mapping[str, Any], path: str
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Nothing is cut: the model's part holds all. In 16 bits, the fp32 masters stand in the optimizer's state."""
    weights, optimizer = model["module"], model.get("optimizer")
    if optimizer is None or "state" in optimizer:
        return weights, optimizer
    if "fp32_groups" not in optimizer or "trained" not in layout:
        raise CheckpointFormatError(
            f"{path} was saved by DeepSpeed at stage 0 in 16 bits, by a loop of your own, so nothing tells which of the"
            " fp32 weights is whose. Save at stage 1, where names are stored, or load it with DeepSpeed."
        )
    trained = set(layout["trained"])
    names = [[name for name in group if name in trained] for group in layout["groups"]]
    for members, masters in zip(names, optimizer["fp32_groups"], strict=True):
        for name, master in zip(members, masters, strict=True):
            weights[name] = master
    inner = optimizer["optimizer_state_dict"]
    numbers = dict(enumerate(name for group in names for name in group))
    vectors = {name: {"": None, **inner["state"].get(number, {})} for number, name in numbers.items()}
    groups = [_Group(_options(group), members) for group, members in zip(inner["param_groups"], names, strict=True)]
    return weights, _optimizer_state(groups, vectors, layout["groups"])


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _copied(value: Any) -> Any:
    """Parameters of one group share a count of steps in ZeRO, which they must not in torch: it counts in place."""
    return value.clone() if isinstance(value, torch.Tensor) else value
