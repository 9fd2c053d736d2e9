"""The strategies by the names that users write."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from milepost.errors import MisconfigurationException
from milepost.strategies.ddp import DDPStrategy
from milepost.strategies.deepspeed import DeepSpeedStrategy
from milepost.strategies.devices import place
from milepost.strategies.single_device import SingleDeviceStrategy
from milepost.strategies.strategy import Strategy
from milepost.strategies.xla import ACCELERATORS, XLA_NAMES, xla_strategy

_NAMES: dict[str, Callable[[], Strategy]] = {
    "ddp": DDPStrategy,
    "ddp_find_unused_parameters_true": lambda: DDPStrategy(find_unused_parameters=True),
    "ddp_find_unused_parameters_false": lambda: DDPStrategy(find_unused_parameters=False),
    "fsdp": lambda: _fsdp(),
    "fsdp_cpu_offload": lambda: _fsdp(cpu_offload=True),
    "deepspeed": DeepSpeedStrategy,
    **{f"deepspeed_stage_{n}": partial(DeepSpeedStrategy, stage=n) for n in (1, 2, 3)},
    "deepspeed_stage_2_offload": partial(DeepSpeedStrategy, stage=2, offload_optimizer=True),
    "deepspeed_stage_3_offload": partial(DeepSpeedStrategy, stage=3, offload_optimizer=True, offload_parameters=True),
    "deepspeed_stage_3_offload_nvme": partial(
        DeepSpeedStrategy, stage=3, offload_optimizer=True, offload_optimizer_device="nvme"
    ),
}
_REMEDIES = {
    "ddp_spawn": "ranks are started as processes of their own, which run the same script: use 'ddp'",
    "ddp_fork": "ranks are started as processes of their own, which run the same script: use 'ddp'",
    "ddp_notebook": "a notebook cannot be run once for each rank: put the training into a script and use 'ddp'",
    "dp": "torch advises against DataParallel: use 'ddp'",
}


def strategy_of(given: str | Strategy, accelerator: str, devices: Any, num_nodes: int) -> Strategy:
    """The strategy that the Trainer's arguments mean, told where it is to run.

    ``"auto"`` is one device where there is one rank, and DDP where there are more.

    Raises:
        MisconfigurationException: an unknown name, or devices that do not go with it.
    """
    if isinstance(given, Strategy):
        given.place(accelerator, devices, num_nodes)
        return given
    if given in _REMEDIES:
        raise MisconfigurationException(f"Trainer(strategy={given!r}) is not supported: {_REMEDIES[given]}.")
    if accelerator in ACCELERATORS or given in XLA_NAMES:
        strategy = xla_strategy(given, devices)
        strategy.place(accelerator, devices, num_nodes)
        return strategy
    placement = place(accelerator, devices, num_nodes)
    several = placement.ranks > 1
    if given == "single_device" or (given == "auto" and not several):
        if several:
            raise MisconfigurationException(
                f"strategy='single_device' with {placement.ranks} ranks: give devices=1, or strategy='ddp'."
            )
        single = SingleDeviceStrategy(placement.devices[0])
        single.place(accelerator, devices, num_nodes)
        return single
    build = _NAMES.get("ddp" if given == "auto" else given)
    if build is None:
        known = ", ".join(map(repr, ["auto", "single_device", *_NAMES, *XLA_NAMES]))
        raise MisconfigurationException(
            f"Trainer(strategy={given!r}) is not supported: use one of {known}, or a Strategy object."
        )
    strategy = build()
    strategy.place(accelerator, devices, num_nodes)
    return strategy


def _fsdp(**options: Any) -> Strategy:
    from milepost.strategies.fsdp import FSDPStrategy  # it imports much of torch

    return FSDPStrategy(**options)
