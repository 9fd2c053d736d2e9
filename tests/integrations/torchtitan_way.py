"""A checkpointer that calls DCP as torchtitan's does, written from what that does; writer and reader are Milepost's.

Weights stand at the top of the state under their own names, optimizer state is flattened by parameter names, the data
loader of each rank has a key of its own, saves run in the background on a group of their own, old ones are purged.
"""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from milepost.integrations.dcp import MilepostReader, MilepostWriter

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class ModelWrapper(Stateful):
    def __init__(self, parts: list[torch.nn.Module]) -> None:
        self.parts = parts

    def state_dict(self) -> dict[str, Any]:
        return {key: value for part in self.parts for key, value in get_model_state_dict(part).items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part in self.parts:
            set_model_state_dict(part, state_dict, options=StateDictOptions(strict=False))


class OptimizersContainer(Stateful):
    def __init__(self, parts: list[torch.nn.Module], optimizers: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        self.optimizers = optimizers

    def state_dict(self) -> dict[str, Any]:
        pairs = zip(self.parts, self.optimizers, strict=True)
        return {k: v for part, one in pairs for k, v in get_optimizer_state_dict(part, one, options=FLAT).items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, one in zip(self.parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, one, optim_state_dict=state_dict, options=FLAT)


class DataLoader(Stateful):
    """Each rank's position, pickled by the loader itself, under a key of its own."""

    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {f"dp_rank_{dist.get_rank()}": pickle.dumps({"at": self.position}), "world_size": dist.get_world_size()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = pickle.loads(state_dict[f"dp_rank_{dist.get_rank()}"])["at"]


class TrainState(Stateful):
    def __init__(self) -> None:
        self.step = 0
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step, dtype=torch.int32), "losses": list(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.losses = int(state_dict["step"]), state_dict["losses"]


class CheckpointManager:
    def __init__(self, folder: Path, states: dict[str, Any], keep: int = 2) -> None:
        self.folder = folder
        self.states = states
        self.keep = keep
        self.group = dist.new_group(backend="gloo")
        self.future: Any = None
        staging = StagingOptions(False, False, use_async_staging=True, use_non_blocking_copy=False)
        self.stager = DefaultStager(staging)  # pinned and shared memory need an accelerator

    def flattened(self) -> dict[str, Any]:
        state = {key: value for key, value in self.states.items() if key != "model"}
        return state | self.states["model"].state_dict()

    def save(self, step: int, mode: str) -> None:
        self.wait()
        writer = MilepostWriter()
        path = self.folder / f"step-{step}"
        if mode == "sync":
            dcp.save(self.flattened(), checkpoint_id=path, storage_writer=writer)
        elif mode == "async":
            self.future = dcp.async_save(
                self.flattened(), checkpoint_id=path, storage_writer=writer, process_group=self.group
            )
        else:
            response = dcp.async_save(
                self.flattened(), checkpoint_id=path, storage_writer=writer, process_group=self.group,
                async_stager=self.stager,
            )  # fmt: skip
            response.staging_completion.result()
            self.future = response.upload_completion

    def wait(self) -> None:
        if self.future is not None:
            self.future.result()
            self.future = None
        self.purge()

    def purge(self) -> None:
        dist.barrier(self.group)
        if dist.get_rank() == 0:
            for step in self.steps()[: -self.keep]:
                shutil.rmtree(self.folder / f"step-{step}")
        dist.barrier(self.group)

    def steps(self) -> list[int]:
        found = [re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match in found if match)

    def load(self) -> int:
        step = self.steps()[-1]
        state = self.flattened()
        dcp.load(state, checkpoint_id=self.folder / f"step-{step}", storage_reader=MilepostReader())
        self.states["model"].load_state_dict(state)
        return step

    def load_weights(self, step: int) -> dict[str, Any]:
        """The weights alone, some of which are new."""
        state = self.states["model"].state_dict() | {"new.weight": torch.full((2,), 7.0)}
        dcp.load(
            state, checkpoint_id=self.folder / f"step-{step}", storage_reader=MilepostReader(),
            planner=DefaultLoadPlanner(allow_partial_load=True),
        )  # fmt: skip
        return state
