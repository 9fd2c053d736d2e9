"""XLA devices, on torch_xla's CPU runtime: ``make test-xla``, in an environment of its own (torch 2.9)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("PJRT_DEVICE", "CPU")
pytest.importorskip("torch_xla", reason="torch_xla wants torch 2.9 and an environment of its own: make test-xla")

import torch
import torch_xla.core.xla_model as xm
from xla_run import Net, digest, fit

from milepost import Checkpointer, RandomState, Trainer
from milepost.errors import MisconfigurationException
from milepost.plugins import CheckpointIO, TorchCheckpointIO, XLACheckpointIO
from milepost.strategies import SingleDeviceStrategy, SingleDeviceXLAStrategy, XLAStrategy

RUN = Path(__file__).with_name("xla_run.py")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return fit(tmp_path_factory.mktemp("unbroken"), "xla")


def test_the_device_draws_for_itself(unbroken: Net) -> None:
    """Or the tests of resuming would show nothing: with another state of the device, other losses."""
    assert len(unbroken.losses) == 20
    state = xm.get_rng_state()
    drawn = [torch.rand(3, device="xla").cpu() for _ in range(2)]
    assert not torch.equal(*drawn) and xm.get_rng_state() != state


def test_saving_changes_nothing(tmp_path: Path, unbroken: Net) -> None:
    """Seldom, or not at all: the same random numbers are drawn on the device."""
    for saves in ({"every_n_train_steps": 3}, {"save_top_k": 0}):
        assert digest(fit(tmp_path, "xla", **saves)) == digest(unbroken)


@pytest.mark.parametrize(("plugin", "batch"), [("xla", 7), ("snapshot", 12), ("async", 15)])
def test_killed_and_resumed_ends_bit_for_bit_the_same(tmp_path: Path, unbroken: Net, plugin: str, batch: int) -> None:
    killed = subprocess.run(
        [sys.executable, str(RUN), str(tmp_path), plugin, str(batch)], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    resumed = fit(tmp_path, plugin, ckpt_path="last")
    assert 20 - batch <= len(resumed.losses) <= 20 - batch + 5, "it began anew"
    assert resumed.losses == unbroken.losses[-len(resumed.losses) :]
    assert digest(resumed) == digest(unbroken)


def test_the_devices_random_state_is_restored(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, background=False) as c:
        c.save(1, {"rng": RandomState()})
        drawn = torch.rand(5, device="xla").cpu()
        assert not torch.equal(drawn, torch.rand(5, device="xla").cpu())
        c.restore({"rng": RandomState()})
        assert torch.equal(drawn, torch.rand(5, device="xla").cpu())


def test_xla_checkpoint_io_writes_what_loads_on_the_cpu(tmp_path: Path) -> None:
    io, weight = XLACheckpointIO(), torch.arange(6.0, device="xla").reshape(2, 3)
    io.save_checkpoint({"global_step": 3, "w": weight, "half": weight.bfloat16()}, tmp_path / "a.ckpt")
    assert io.verify(tmp_path / "a.ckpt") is None
    for found in (
        io.load_checkpoint(tmp_path / "a.ckpt"),
        TorchCheckpointIO().load_checkpoint(tmp_path / "a.ckpt"),
        torch.load(tmp_path / "a.ckpt", weights_only=True),
    ):
        assert found["w"].device.type == "cpu" and torch.equal(found["w"], torch.arange(6.0).reshape(2, 3))
        assert found["half"].dtype == torch.bfloat16


def test_a_checkpoint_goes_to_one_device_without_xla(tmp_path: Path, unbroken: Net) -> None:
    io = XLACheckpointIO()
    io.save_checkpoint({"state_dict": unbroken.state_dict()}, tmp_path / "a.ckpt")
    plain = Net()
    plain.load_state_dict(TorchCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["state_dict"])
    assert digest(plain) == digest(unbroken)


class Watching(CheckpointIO):
    """A plugin of a user's own; it notes where the tensors were that it was given."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.calls: list[str] = []
        self.devices: set[str] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.calls.append("save")
        self._look(checkpoint)
        self.kept[str(path)] = checkpoint

    def _look(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.devices.add(value.device.type)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            self._look(item)

    def load_checkpoint(self, path: Any, map_location: Any = None) -> Any:
        self.calls.append("load")
        return self.kept[str(path)]

    def remove_checkpoint(self, path: Any) -> None:
        self.calls.append("remove")
        self.kept.pop(str(path), None)


@pytest.mark.parametrize("through", ["strategy", "plugins"])
@pytest.mark.parametrize("kind", [SingleDeviceXLAStrategy, XLAStrategy])
def test_a_custom_plugin_saves_loads_and_removes(tmp_path: Path, kind: Any, through: str) -> None:
    io = Watching()
    strategy = kind(checkpoint_io=io) if through == "strategy" else kind()
    trainer = Trainer(strategy=strategy, plugins=[io] if through == "plugins" else None, max_steps=1, logger=False,
                      enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    trainer.fit(
        model := Net(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 8)), batch_size=4)
    )
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert io.devices == {"cpu"}
    found = strategy.load_checkpoint(str(tmp_path / "a.ckpt"))
    assert torch.equal(found["state_dict"]["last.bias"], model.last.bias.cpu())
    assert found["state_dict"]["last.weight"] is found["state_dict"]["first.weight"], "tied weights came apart"
    strategy.remove_checkpoint(str(tmp_path / "a.ckpt"))
    assert io.calls == ["save", "load", "remove"] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"accelerator": "tpu"}, SingleDeviceXLAStrategy),
        ({"accelerator": "tpu", "devices": 1}, SingleDeviceXLAStrategy),
        ({"accelerator": "tpu", "devices": [0], "strategy": "single_tpu"}, SingleDeviceXLAStrategy),
        ({"strategy": "single_xla"}, SingleDeviceXLAStrategy),
        ({"strategy": "single_tpu"}, SingleDeviceXLAStrategy),
        ({"strategy": "xla"}, XLAStrategy),
        ({"accelerator": "tpu", "strategy": "xla"}, XLAStrategy),
        ({"accelerator": "cpu"}, SingleDeviceStrategy),
        ({}, SingleDeviceStrategy),
    ],
)
def test_names(given: dict[str, Any], kind: Any) -> None:
    strategy = Trainer(**given, logger=False).strategy
    assert type(strategy) is kind
    assert strategy.root_device.type == ("cpu" if kind is SingleDeviceStrategy else "xla")
    assert isinstance(strategy.checkpoint_io, XLACheckpointIO) == (kind is not SingleDeviceStrategy)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"accelerator": "tpu", "devices": 8}, "devices=8.*all-reduce.*devices=1"),
        ({"accelerator": "tpu", "strategy": "ddp"}, "'ddp'.*does not run on an XLA device"),
        ({"accelerator": "gpu", "strategy": "single_xla"}, "accelerator='gpu'.*'tpu'"),
        ({"strategy": "xla", "num_nodes": 2}, "num_nodes=2"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(given: dict[str, Any], said: str) -> None:
    with pytest.raises(MisconfigurationException, match=said):
        Trainer(**given, logger=False)


def test_of_two_devices_the_first_saves_and_training_is_refused(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(RUN.with_name("two_devices.py")), str(tmp_path)],
        env={**os.environ, "CPU_NUM_DEVICES": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    said = run.stdout
    assert "device 0 xla:0 True" in said and "device 1 xla:1 False" in said
    assert "files ['0.ckpt']" in said
    assert "refused XLAStrategy: the runtime has 2 devices; it trains on one XLA device" in said
