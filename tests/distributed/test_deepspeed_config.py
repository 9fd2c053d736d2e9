"""What DeepSpeedStrategy takes, maps and refuses, before any process is started. Needs no DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from milepost import Trainer, _optional
from milepost.errors import MisconfigurationException, MissingDependencyError
from milepost.strategies import deepspeed_config as configs
from milepost.strategies.deepspeed import DeepSpeedStrategy


def test_lightnings_arguments_become_deepspeeds_configuration() -> None:
    built = configs.build(None, True, 3, {"offload_optimizer": True, "offload_parameters": True, "pin_memory": True,
                                          "reduce_bucket_size": 7, "loss_scale": 4, "thread_count": 2,
                                          "logging_batch_size_per_gpu": 16})  # fmt: skip
    zero = built["zero_optimization"]
    assert zero["stage"] == 3 and zero["reduce_bucket_size"] == 7
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
    assert zero["offload_optimizer"]["pin_memory"] is True
    assert built["aio"]["thread_count"] == 2 and built["train_micro_batch_size_per_gpu"] == 16
    whole = configs.completed(built, precision="16-mixed", accumulate=3, clip=0.5, batch_size=1)
    assert whole["fp16"]["enabled"] and whole["fp16"]["loss_scale"] == 4
    assert whole["gradient_accumulation_steps"] == 3 and whole["gradient_clipping"] == 0.5
    assert "zero_optimization" not in configs.build(None, False, 2, {})


def test_a_configuration_is_taken_as_dict_as_file_and_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(given))
    for config in (given, str(file), file):
        assert configs.stage_of(configs.build(config, True, 3, {})) == 1
    monkeypatch.setenv("PL_DEEPSPEED_CONFIG_PATH", str(file))
    assert configs.stage_of(configs.build(None, True, 3, {})) == 1
    with pytest.raises(MisconfigurationException, match="no such file"):
        configs.build(str(tmp_path / "none.json"), True, 3, {})


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"offload_optimizer": True, "offload_optimizer_device": "nvme"}, "Offload the optimizer to 'cpu'"),
        ({"config": {"checkpoint": {"load_universal": True}}}, "restore={'model'}"),
        ({"config": {"checkpoint": {"use_node_local_storage": True}}}, "storage that all ranks see"),
        ({"config": {"checkpoint": {"writer": {"type": "fast"}}}}, "checkpoint_io=AsyncCheckpointIO"),
        ({"config": {"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}}, "Leave it out"),
        ({"config": {"optimizer": {"type": "Adam"}}}, "configure_optimizers"),
        ({"config": {"gradient_accumulation_steps": 2}}, "accumulate_grad_batches"),
        ({"stage": 4}, "stages 0, 1, 2 and 3"),
        ({"remote_device": "nvme"}, "remote_device out"),
        ({"partition_gradients": True}, "is not known"),
        ({"precision_plugin": object()}, "Trainer"),
    ],
)
def test_what_cannot_be_honoured_is_refused_at_construction_with_the_alternative(
    options: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(MisconfigurationException, match=remedy):
        DeepSpeedStrategy(**options)


def test_without_deepspeed_its_names_say_what_to_install() -> None:
    if _optional.available("deepspeed"):
        stages = {"deepspeed": 2, "deepspeed_stage_1": 1, "deepspeed_stage_3_offload": 3}
        for name, stage in stages.items():
            made = Trainer(strategy=name, accelerator="cpu", logger=False, precision="bf16-mixed")
            assert made.strategy.stage == stage  # type: ignore[attr-defined]
        return
    with pytest.raises(MissingDependencyError, match=r"milepost\[deepspeed\]"):
        Trainer(strategy="deepspeed_stage_2", accelerator="cpu")
