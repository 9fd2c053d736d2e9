"""A plain DeepSpeed loop on two ranks, whose checkpoints go through CheckpointIOs; prints what it has seen.

Usage: torchrun --nproc-per-node 2 deepspeed_loop.py DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from milepost.errors import CheckpointCorruptError, CheckpointNotFoundError, CheckpointSaveError
from milepost.plugins.io import (
    AsyncCheckpointIO,
    CheckpointIO,
    SafetensorsCheckpointIO,
    SnapshotCheckpointIO,
    TorchCheckpointIO,
)
from milepost.plugins.io import checkpoint_io as calls
from milepost.plugins.io.deepspeed_engine import CheckpointIOEngine

BUILT_IN = {0: AsyncCheckpointIO, 1: SafetensorsCheckpointIO, 2: SnapshotCheckpointIO, 3: TorchCheckpointIO}


class Cupboard(CheckpointIO):
    """A user's plugin: pickles in a folder of its own, under names of its own; keeps a list of its calls."""

    def __init__(self, folder: Path, fails: str = "") -> None:
        self.folder, self.fails, self.calls = folder, fails, []
        folder.mkdir(exist_ok=True)

    def _place(self, path: Any) -> Path:
        return self.folder / str(path).strip("/").replace("/", "+")

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.calls.append(("save", Path(path).name))
        if self.fails and self.fails in str(path):
            raise PermissionError(13, "the cupboard is locked")
        torch.save(checkpoint, self._place(path))

    def load_checkpoint(self, path: Any, storage_options: Any = None) -> dict[str, Any]:
        self.calls.append(("load", Path(path).name))
        return torch.load(self._place(path), weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        self.calls.append(("remove", Path(path).name))
        self._place(path).unlink(missing_ok=True)

    def exists(self, path: Any) -> bool:
        return self._place(path).exists()


def build(stage: int, io: Any) -> Any:
    torch.manual_seed(0)
    first, second, norm = torch.nn.Linear(7, 16), torch.nn.Linear(16, 3), torch.nn.BatchNorm1d(16)
    first.bias.requires_grad_(False)
    model = torch.nn.Sequential(first, norm, torch.nn.ReLU(), second)
    groups = [{"params": first.parameters()}, {"params": [*norm.parameters(), *second.parameters()], "lr": 0.02}]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=0.01), config=config)[0]
    engine.checkpoint_engine = CheckpointIOEngine(io)
    return engine


def train(engine: Any, steps: int, seed: int) -> list[float]:
    random = torch.Generator().manual_seed(seed + dist.get_rank())
    losses = []
    for _ in range(steps):
        loss = engine(torch.randn(4, 7, generator=random)).pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def own_view(engine: Any) -> dict[str, list[torch.Tensor]]:
    """Weights and moments as DeepSpeed itself tells them. A collective."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # Stages 1 and 2 of 0.19.8 link weights to moments after the step of the first group, when others have none.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    return {
        name: [
            safe_get_full_fp32_param(p).clone(),
            *(safe_get_full_optimizer_state(p, key).clone() for key in ("exp_avg", "exp_avg_sq")),
        ]
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }


def compare(path: str, io: Any, own: dict[str, list[torch.Tensor]]) -> None:
    """What the single-device view of the checkpoint holds is what DeepSpeed had, bit for bit."""
    whole = calls.load(io, path)
    state, groups = whole["optimizer_states"][0]["state"], whole["optimizer_states"][0]["param_groups"]
    assert [group["lr"] for group in groups] == [0.01, 0.02]
    numbered = ["0.weight", "1.weight", "1.bias", "3.weight", "3.bias"]
    if len(groups[0]["params"]) == 2:  # stage 0 keeps the parameter that is not trained
        numbered.insert(1, "0.bias")
    for number, name in enumerate(numbered):
        if name in own:
            weight, *moments = own[name]
            assert torch.equal(whole["state_dict"][name], weight), name
            assert torch.equal(state[number]["exp_avg"], moments[0]), name
            assert torch.equal(state[number]["exp_avg_sq"], moments[1]), name
            assert state[number]["step"] == 3
    assert set(whole["state_dict"]) >= {"0.bias", "1.running_mean", "1.num_batches_tracked"}


def check_built_in(stage: int, folder: Path) -> None:
    io, place = BUILT_IN[stage](), str(folder / f"stage{stage}")
    engine = build(stage, io)
    train(engine, 3, seed=1)
    own = own_view(engine) if stage else {}
    engine.save_checkpoint(place, client_state={"note": (1, "two")})
    unbroken = train(engine, 2, seed=9)
    fresh = build(stage, io)
    _, client = fresh.load_checkpoint(place)
    assert client["note"] == (1, "two")
    assert train(fresh, 2, seed=9) == unbroken
    path = f"{place}/global_step3"
    compare(path, io, own)
    assert calls.exists(io, path) and calls.list_checkpoints(io, place) == [path]
    assert calls.verify(io, path) is None
    dist.barrier()  # rank 0 damages it next
    if stage == 3 and dist.get_rank() == 0:
        theirs = get_fp32_state_dict_from_zero_checkpoint(place)
        assert all(torch.equal(theirs[name], weight) for name, (weight, *_) in own.items())
        for part in Path(path).iterdir():
            torch.load(part, weights_only=True)
        damage(path, io)
    calls.teardown(io)


def damage(path: str, io: Any) -> None:
    part = Path(path, "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    for attempt in (calls.verify, calls.load):
        try:
            attempt(io, path)
        except CheckpointCorruptError as error:
            assert part.name in str(error)
        else:
            raise AssertionError("a flipped bit was not found")


def check_own_plugin(folder: Path) -> list[Any]:
    """Each file through the plugin; a failure on one rank is an error on both, and no checkpoint."""
    io = Cupboard(folder / "cupboard")
    engine = build(2, io)
    train(engine, 1, seed=1)
    place = str(folder / "elsewhere")
    engine.save_checkpoint(place, tag="a")
    io.fails = "zero_pp_rank_1"
    try:
        engine.save_checkpoint(place, tag="b")
    except CheckpointSaveError as error:
        assert "rank 1: PermissionError" in str(error) and "cupboard is locked" in str(error), error
    else:
        raise AssertionError("the failure of rank 1 was not told")
    io.fails = ""
    dist.barrier()
    assert calls.exists(io, f"{place}/a") and not calls.exists(io, f"{place}/b")
    assert Path(place, "latest").read_text() == "a"
    try:
        io.load_checkpoint(f"{place}/b/mp_rank_00_model_states.pt")
    except FileNotFoundError:
        pass
    else:
        raise AssertionError("the part of the failed save was left")
    dist.barrier()
    if dist.get_rank() == 0:
        calls.remove(io, f"{place}/a")
        assert not list(io.folder.iterdir())
    Path(place, "c").mkdir(parents=True, exist_ok=True)
    Path(place, "c", "mp_rank_00_model_states.pt").touch()  # as a save that was cut short leaves it
    try:
        engine.load_checkpoint(place, tag="c")
    except CheckpointNotFoundError as error:
        assert "no record.ckpt beside it" in str(error)
    else:
        raise AssertionError("half a checkpoint was loaded")
    return io.calls


def main() -> None:
    folder = Path(sys.argv[1])
    deepspeed.init_distributed("gloo")
    for stage in BUILT_IN:
        check_built_in(stage, folder)
    seen = check_own_plugin(folder)
    (folder / f"calls{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
