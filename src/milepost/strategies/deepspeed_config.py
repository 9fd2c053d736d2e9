"""From the arguments of `DeepSpeedStrategy` to the configuration that DeepSpeed takes. Pure, but for reading a file."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from milepost.errors import MisconfigurationException

_ZERO = {
    "contiguous_gradients": True,
    "overlap_comm": True,
    "allgather_partitions": True,
    "reduce_scatter": True,
    "allgather_bucket_size": 200_000_000,
    "reduce_bucket_size": 200_000_000,
    "sub_group_size": 1_000_000_000_000,
}
_ACTIVATIONS = {
    "partition_activations": False,
    "cpu_checkpointing": False,
    "contiguous_memory_optimization": False,
    "synchronize_checkpoint_boundary": False,
}
_AIO = {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True, "thread_count": 1}
_OFFLOAD = {
    "offload_optimizer": False,
    "offload_parameters": False,
    "offload_params_device": "cpu",
    "offload_optimizer_device": "cpu",
    "nvme_path": "/local_nvme",
    "params_buffer_count": 5,
    "params_buffer_size": 100_000_000,
    "max_in_cpu": 1_000_000_000,
    "optimizer_buffer_count": 4,
    "pin_memory": False,
}
_SCALING = {
    "loss_scale": 0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
_OTHERS = {
    "zero_allow_untested_optimizer": True,
    "logging_batch_size_per_gpu": "auto",
    "remote_device": None,
    "load_full_weights": False,  # a single file with full weights is always loaded
}
_DEFAULTS = {**_ZERO, **_ACTIVATIONS, **_AIO, **_OFFLOAD, **_SCALING, **_OTHERS}
_ENVIRONMENT = "PL_DEEPSPEED_CONFIG_PATH"

_Refusal = tuple[Callable[[dict[str, Any]], Any], str]
_REFUSED: list[_Refusal] = [
    (
        lambda c: _zero(c, "offload_optimizer").get("device") == "nvme",
        "zero_optimization.offload_optimizer on NVMe: DeepSpeed copies its swap files into the checkpoint itself, past"
        " every CheckpointIO. Offload the optimizer to 'cpu'",
    ),
    (
        lambda c: _section(c, "zero_optimization").get("elastic_checkpoint"),
        "zero_optimization.elastic_checkpoint: it drops the optimizer's options. Leave it out",
    ),
    (
        lambda c: _section(c, "checkpoint").get("load_universal"),
        "checkpoint.load_universal: it reads files past the CheckpointIO. Leave it out; a checkpoint of another layout"
        " gives its weights with fit(restore={'model'})",
    ),
    (
        lambda c: _section(c, "checkpoint").get("use_node_local_storage"),
        "checkpoint.use_node_local_storage: a checkpoint is one, on storage that all ranks see. Leave it out",
    ),
    (
        lambda c: _section(c, "checkpoint").get("writer") or c.get("datastates_ckpt") or c.get("nebula"),
        "a checkpoint engine of DeepSpeed's own (checkpoint.writer, datastates_ckpt, nebula): the CheckpointIO takes"
        " its place. Give checkpoint_io=AsyncCheckpointIO() or another",
    ),
    (
        lambda c: "optimizer" in c or "scheduler" in c,
        "optimizer and scheduler: return them from configure_optimizers",
    ),
    (
        lambda c: "gradient_accumulation_steps" in c or "train_batch_size" in c,
        "gradient_accumulation_steps and train_batch_size: give Trainer(accumulate_grad_batches=...), and the loader"
        " its batch size",
    ),
]


def build(config: Any, zero_optimization: bool, stage: int, options: dict[str, Any]) -> dict[str, Any]:
    """The configuration of `DeepSpeedStrategy`'s arguments; a `config` (dict or path of a JSON file) goes before them.

    Raises:
        MisconfigurationException: an unknown argument, or what a CheckpointIO cannot honour; the message names the
            alternative.
    """
    if unknown := sorted(set(options) - set(_DEFAULTS)):
        raise MisconfigurationException(
            f"DeepSpeedStrategy({unknown[0]}=...) is not known. Known are config, stage, zero_optimization,"
            f" {', '.join(sorted(_DEFAULTS))}."
        )
    given = {**_DEFAULTS, **options}
    if given["remote_device"] == "nvme":
        raise MisconfigurationException(
            "DeepSpeedStrategy(remote_device='nvme'): the model is built in memory here. Leave remote_device out."
        )
    built = _read(config)
    built = _of_arguments(zero_optimization, stage, given) if built is None else built
    for holds, what in _REFUSED:
        if holds(built):
            raise MisconfigurationException(f"DeepSpeedStrategy cannot honour {what}.")
    if _section(built, "zero_optimization").get("stage", 0) not in (0, 1, 2, 3):
        raise MisconfigurationException(f"DeepSpeedStrategy(stage={stage!r}): ZeRO has the stages 0, 1, 2 and 3.")
    built.setdefault("zero_force_ds_cpu_optimizer", False)  # else DeepSpeed offloads no optimizer but its own
    return built


def stage_of(config: dict[str, Any]) -> int:
    return int(_section(config, "zero_optimization").get("stage", 0))


def completed(
    config: dict[str, Any], *, precision: str, accumulate: int, clip: float | None, batch_size: int
) -> dict[str, Any]:
    """`config` with what the Trainer says, where it says nothing itself."""
    whole = {"train_micro_batch_size_per_gpu": batch_size, "gradient_clipping": clip or 0.0, **config}
    whole["gradient_accumulation_steps"] = accumulate
    if precision.startswith("16"):
        whole.setdefault("fp16", {"enabled": True, **config.get("_scaling", {})})
    if precision.startswith("bf16"):
        whole.setdefault("bf16", {"enabled": True})
    whole.pop("_scaling", None)
    return whole


def _of_arguments(zero_optimization: bool, stage: int, given: dict[str, Any]) -> dict[str, Any]:
    built: dict[str, Any] = {
        "activation_checkpointing": {name: given[name] for name in _ACTIVATIONS},
        "aio": {name: given[name] for name in _AIO},
        "_scaling": {name: given[name] for name in _SCALING},
    }
    if zero_optimization:
        built["zero_optimization"] = {"stage": stage, **{name: given[name] for name in _ZERO}}
        built["zero_allow_untested_optimizer"] = given["zero_allow_untested_optimizer"]
        built["zero_optimization"].update(_offload(given))
    if given["logging_batch_size_per_gpu"] != "auto":
        built["train_micro_batch_size_per_gpu"] = given["logging_batch_size_per_gpu"]
    built["_scaling"]["loss_scale"] = given["loss_scale"]
    return built


def _offload(given: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    both = {"nvme_path": given["nvme_path"], "pin_memory": given["pin_memory"]}
    if given["offload_optimizer"]:
        device = given["offload_optimizer_device"]
        found["offload_optimizer"] = {"device": device, "buffer_count": given["optimizer_buffer_count"], **both}
    if given["offload_parameters"]:
        found["offload_param"] = {
            "device": given["offload_params_device"],
            "buffer_count": given["params_buffer_count"],
            "buffer_size": given["params_buffer_size"],
            "max_in_cpu": given["max_in_cpu"],
            **both,
        }
    return found


def _read(config: Any) -> dict[str, Any] | None:
    config = os.environ.get(_ENVIRONMENT) if config is None else config
    if isinstance(config, (str, os.PathLike)):
        path = Path(config)
        if not path.is_file():
            raise MisconfigurationException(f"DeepSpeedStrategy(config={str(config)!r}): there is no such file.")
        config = json.loads(path.read_text())
    if config is not None and not isinstance(config, dict):
        raise MisconfigurationException(
            f"DeepSpeedStrategy(config={config!r}): give a dict, or the path of a JSON file."
        )
    return copy.deepcopy(config)


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    return config.get(name) or {}


def _zero(config: dict[str, Any], name: str) -> dict[str, Any]:
    return _section(_section(config, "zero_optimization"), name)
