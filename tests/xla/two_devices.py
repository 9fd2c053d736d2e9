"""Two devices in one process, a thread for each: ``CPU_NUM_DEVICES=2 two_devices.py DIRECTORY``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch_xla
from xla_run import Net

from milepost import Trainer
from milepost.errors import MisconfigurationException
from milepost.strategies import XLAStrategy


def one_device(index: int) -> None:
    strategy = XLAStrategy()
    given = {"global_step": 1, "w": torch.full((3,), float(index), device=strategy.root_device)}
    handle = strategy.save_checkpoint(given, f"{sys.argv[1]}/{index}.ckpt")
    handle.result()
    print("device", index, strategy.root_device, strategy.is_global_zero, flush=True)


def main() -> None:
    torch_xla.launch(one_device, args=())
    print("files", [p.name for p in Path(sys.argv[1]).iterdir()])
    try:
        Trainer(strategy="xla", max_steps=1, logger=False, enable_progress_bar=False).fit(Net(), [torch.ones(4, 8)])
    except MisconfigurationException as error:
        print("refused", error)


if __name__ == "__main__":
    main()
