"""What a Module offers beside its hooks: gathering, freezing, where it is, and words about what is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from milepost import Module, Trainer
from milepost.errors import MisconfigurationException
from milepost.strategies import SingleDeviceStrategy, Strategy


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)


def test_gathering_on_one_process_changes_nothing() -> None:
    gathered = Net().all_gather({"a": [1, torch.ones(2)], "b": (2.5, "text")})
    assert gathered["a"][0] == 1 and gathered["a"][1].shape == (2,) and gathered["b"] == (torch.tensor(2.5), "text")


def _asked(strategy: Strategy, rank: int) -> list[Any]:
    """What callbacks ask a strategy for."""
    strategy.barrier("all there")
    number = torch.tensor(rank + 1)
    return [
        strategy.broadcast({"rank": rank}),
        strategy.all_gather(number).tolist(),
        strategy.reduce(number).item(),
        strategy.reduce(number, reduce_op="sum").item(),
        strategy.reduce("text"),
        strategy.reduce_boolean_decision(rank == 0),
        strategy.reduce_boolean_decision(rank == 0, all=False),
    ]


def test_a_strategy_on_one_process_says_what_it_is_asked() -> None:
    assert _asked(SingleDeviceStrategy("cpu"), 0) == [{"rank": 0}, 1, 1, 1, "text", True, True]


def test_a_strategy_may_choose_the_weights_that_are_saved(tmp_path: Path) -> None:
    class TrainedOnly(SingleDeviceStrategy):
        def lightning_module_state_dict(self) -> dict[str, Any]:
            trained = {name for name, p in self.lightning_module.named_parameters() if p.requires_grad}
            return {k: v for k, v in super().lightning_module_state_dict().items() if k in trained}

        def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
            return {**super().optimizer_state(optimizer), "kept by": "strategy"}

    class Tuned(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            self.layer.bias.requires_grad_(False)
            return torch.optim.SGD([self.layer.weight], lr=0.1)

    trainer = Trainer(
        strategy=TrainedOnly("cpu"), max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Tuned(), DataLoader(torch.ones(4, 2)))
    trainer.save_checkpoint(tmp_path / "a.ckpt").result()
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == ["layer.weight"]
    assert saved["optimizer_states"][0]["kept by"] == "strategy"


def _gather(rank: int, folder: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    net = Net()
    weight = torch.tensor([1.0 + rank], requires_grad=True)
    stacked = net.all_gather({"loss": weight, "n": rank}, sync_grads=True)
    (stacked["loss"].sum() * (rank + 1)).backward()
    plain = net.all_gather(weight.detach())
    results[rank] = (stacked["loss"].tolist(), stacked["n"].tolist(), weight.grad.tolist(), plain.shape)  # type: ignore
    results[f"strategy {rank}"] = _asked(SingleDeviceStrategy("cpu"), rank)
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_gathering_stacks_what_the_ranks_have(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as shared:
        results = shared.dict()
        torch.multiprocessing.spawn(_gather, (str(tmp_path), results), nprocs=2)
        for rank in (0, 1):
            loss, count, gradient, shape = results[rank]
            assert loss == [[1.0], [2.0]] and count == [0, 1]
            assert gradient == [3.0]  # of both ranks' use: 1 + 2
            assert shape == (2, 1)
            assert results[f"strategy {rank}"] == [{"rank": 0}, [1, 2], 1.5, 3, "text", False, True]


def test_freezing_and_where_it_is() -> None:
    net = Net()
    net.freeze()
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    net.unfreeze()
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert (net.device, net.dtype, net.on_gpu, net.device_mesh) == (torch.device("cpu"), torch.float32, False, None)
    assert net.example_input_array is None


def test_a_module_built_under_the_trainer_has_its_device_and_type() -> None:
    trainer = Trainer(accelerator="cpu", precision="64-true", logger=False)
    with trainer.init_module():
        net = Net()
    assert net.dtype == torch.float64 and net.device == trainer.strategy.root_device
    assert trainer.validate_loop.stage == "validation" and trainer.val_check_batch == float("inf")


@pytest.mark.parametrize(
    ("method", "instead"), [("to_onnx", "torch.onnx"), ("to_torchscript", "torch.export"), ("to_tensorrt", "tensorrt")]
)
def test_exports_name_what_to_call(method: str, instead: str) -> None:
    with pytest.raises(MisconfigurationException, match=instead):
        getattr(Net(), method)("file")
