"""FSDP2 and tensor parallel under the Trainer, on two real ranks: exact resume from files and from parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SaveAt, digest, fit, net_of

import milepost
from milepost.errors import MisconfigurationException
from milepost.plugins import SnapshotCheckpointIO, TorchCheckpointIO
from milepost.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from milepost.testing import run_ranks

pytestmark = pytest.mark.timeout(400)  # several processes, each of which imports torch


def sharded(folder: Path, *callbacks: Any, **options: Any) -> tuple[Any, Any]:
    strategy = FSDPStrategy(auto_wrap_policy={torch.nn.Linear}, **options.pop("fsdp", {}))
    return fit(folder, *callbacks, strategy=strategy, gradient_clip_val=0.5, **options)


class Kept:
    """A CheckpointIO that derives from nothing; what it was given stays in memory."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.given.append(checkpoint)

    def load_checkpoint(self, path: Any, storage_options: Any = None) -> Any:
        return self.given[0]

    def remove_checkpoint(self, path: Any) -> None:
        raise AssertionError("nothing is to be removed")


def in_parts_and_whole(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    parts = {"state_dict_type": "sharded"}
    trainer, net = sharded(folder, SaveAt(folder / "parts", [3, 4]), fsdp=parts)
    assert isinstance(trainer.strategy.checkpoint_io, SnapshotCheckpointIO)
    results["whole"] = [net.losses, digest(trainer, net)]
    results["local"] = sum(p.to_local().numel() for p in net.parameters())
    for batch in (3, 4):
        again = sharded(folder, seed=90, fsdp=parts, ckpt_path=folder / "parts" / f"batch{batch}.ckpt")
        results[f"parts{batch}"] = [again[1].losses, digest(*again)]
    sharded(folder, SaveAt(folder / "file", [3]))
    again = sharded(folder, seed=90, ckpt_path=folder / "file" / "batch3.ckpt")
    results["file3"] = [again[1].losses, digest(*again)]
    kept = Kept()
    sharded(folder, SaveAt(folder, [3]), plugins=kept)
    weights = kept.given[0]["state_dict"].values() if kept.given else []
    results["given"] = [len(kept.given), all(type(w) is torch.Tensor and w.device.type == "cpu" for w in weights)]
    io = SnapshotCheckpointIO()
    again = fit(folder, plugins=io, gradient_clip_val=0.5, ckpt_path=folder / "parts" / "batch4.ckpt")
    results["ddp"] = again[1].losses
    fit(folder, SaveAt(folder / "ddp", [4]), strategy="ddp", gradient_clip_val=0.5)
    again = sharded(folder, ckpt_path=folder / "ddp" / "batch4.ckpt")
    results["from ddp"] = again[1].losses
    return results


class Parallel(net_of(milepost, dropout=0.0)):  # type: ignore[misc]
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        if not any(hasattr(p, "to_local") for p in self.parameters()):
            plan = ColwiseParallel(output_layouts=torch.distributed.tensor.Replicate())
            parallelize_module(self.layers[0], self.device_mesh["tensor_parallel"], plan)
            fully_shard(self.layers[3], mesh=self.device_mesh["data_parallel"])


def on_a_mesh(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}

    def run(*callbacks: Any, **options: Any) -> tuple[Any, Any]:
        torch.manual_seed(5)  # ranks of one replica build, and draw, the same
        strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
        trainer = milepost.Trainer(
            accelerator="cpu", devices=2, strategy=strategy, max_epochs=2, accumulate_grad_batches=2,
            enable_checkpointing=False, callbacks=list(callbacks), logger=False, enable_progress_bar=False,
            enable_model_summary=False, gradient_clip_val=0.5,
        )  # fmt: skip
        net = Parallel()
        from runs import loaders

        trainer.fit(net, *loaders(), **options)
        return trainer, net

    trainer, net = run(SaveAt(folder / "mesh", [3]))
    results["whole"], results["samples"] = [net.losses, digest(trainer, net)], net.samples
    trainer, net = run(ckpt_path=folder / "mesh" / "batch3.ckpt")
    results["again"] = [net.losses, digest(trainer, net)]
    return results


def all_on_one_rank(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {"fsdp": in_parts_and_whole(folder), "mesh": on_a_mesh(folder)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(all_on_one_rank, 2, folder)


@pytest.mark.parametrize(("name", "batches"), [("parts3", 3), ("parts4", 4), ("file3", 3)])
def test_goes_on_bit_for_bit(ranks: list[dict[str, Any]], name: str, batches: int) -> None:
    """From each rank's part and from a whole file, inside accumulation and at its end; gradients are clipped."""
    for rank in ranks:
        losses, end = rank["fsdp"]["whole"]
        assert rank["fsdp"][name] == [losses[batches:], end]


def test_each_rank_holds_a_part(ranks: list[dict[str, Any]], folder: Path) -> None:
    whole = sum(p.numel() for p in net_of(milepost)().parameters())
    assert sum(rank["fsdp"]["local"] for rank in ranks) == whole
    names = {path.name for path in (folder / "parts" / "batch3.ckpt").iterdir()}
    assert {"tree-r00000.json", "tree-r00001.json"} <= names


def test_another_plugin_gets_whole_tensors_on_rank_zero(ranks: list[dict[str, Any]]) -> None:
    assert [rank["fsdp"]["given"] for rank in ranks] == [[1, True], [0, True]]


def test_strategies_go_on_from_each_others_checkpoints(ranks: list[dict[str, Any]]) -> None:
    """The batches are the same; sums are made in another order."""
    for rank in ranks:
        losses = rank["fsdp"]["whole"][0]
        assert rank["fsdp"]["ddp"] == pytest.approx(losses[4:], rel=1e-4)
        assert rank["fsdp"]["from ddp"] == pytest.approx(losses[4:], rel=1e-4)


@pytest.mark.parametrize(("file", "io"), [("parts", SnapshotCheckpointIO), ("file", TorchCheckpointIO)])
def test_one_device_goes_on_from_them(ranks: list[dict[str, Any]], folder: Path, file: str, io: Any) -> None:
    path = folder / file / "batch3.ckpt"
    trainer, _ = fit(folder, devices=1, strategy="auto", gradient_clip_val=0.5, plugins=io(), ckpt_path=path)
    assert trainer.global_step > 6


def test_on_a_mesh_ranks_of_a_replica_read_the_same_and_go_on(ranks: list[dict[str, Any]]) -> None:
    losses, end = ranks[0]["mesh"]["whole"]
    assert ranks[0]["mesh"]["samples"] == ranks[1]["mesh"]["samples"]
    for rank in ranks:
        assert rank["mesh"]["again"] == [losses[3:], end]


class Policy:
    """As torch's first FSDP has it."""

    def __init__(self, buffer_dtype: Any = None) -> None:
        self.param_dtype, self.reduce_dtype, self.buffer_dtype = torch.bfloat16, torch.float32, buffer_dtype


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"sharding_strategy": "NO_SHARD"}, "DDPStrategy"),
        ({"sharding_strategy": "HALF"}, "FULL_SHARD"),
        ({"state_dict_type": "local"}, "'full' or 'sharded'"),
        ({"state_dict_type": "sharded", "checkpoint_io": TorchCheckpointIO()}, "SnapshotCheckpointIO"),
        ({"activation_checkpointing": torch.nn.Linear}, "torch.utils.checkpoint"),
        ({"mixed_precision": Policy(torch.bfloat16)}, "buffer_dtype"),
        ({"use_orig_params": False}, "fully_shard"),
        ({"auto_wrap_policy": 3}, "classes of modules"),
    ],
)
def test_what_fsdp2_has_not_is_refused_at_construction(arguments: dict[str, Any], remedy: str) -> None:
    with pytest.raises(MisconfigurationException, match=remedy):
        FSDPStrategy(**arguments)


def test_plugins_and_precisions_that_do_not_go_with_it_are_refused_by_the_trainer() -> None:
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False}
    with pytest.raises(MisconfigurationException, match="SnapshotCheckpointIO"):
        milepost.Trainer(strategy=FSDPStrategy(state_dict_type="sharded"), plugins=TorchCheckpointIO(), **quiet)
    with pytest.raises(MisconfigurationException, match="SnapshotCheckpointIO"):
        milepost.Trainer(strategy=ModelParallelStrategy(), plugins=TorchCheckpointIO(), **quiet)
    with pytest.raises(MisconfigurationException, match="bf16-mixed"):
        milepost.Trainer(strategy="fsdp", precision="16-mixed", **quiet)


def test_the_first_fsdps_arguments_are_mapped() -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    strategy = FSDPStrategy(
        mixed_precision=Policy(), cpu_offload=True, auto_wrap_policy=ModuleWrapPolicy({torch.nn.Linear}),
        sharding_strategy="SHARD_GRAD_OP", use_orig_params=True,
    )  # fmt: skip
    assert (strategy._mixed.param_dtype, strategy._mixed.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert isinstance(strategy._offload, CPUOffloadPolicy)
    assert strategy._wrap(torch.nn.Linear(1, 1)) and not strategy._wrap(torch.nn.ReLU())


class Own(DDPStrategy):
    """A strategy of the user's."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().lightning_module_state_dict().items() if "0" in name}


def test_a_strategy_of_the_users_is_used(tmp_path: Path) -> None:
    assert issubclass(Own, Strategy) and json.dumps(sorted(vars(Own))) != "[]"
    trainer = milepost.Trainer(accelerator="cpu", strategy=Own(), logger=False)
    assert trainer.strategy.world_size == 1
