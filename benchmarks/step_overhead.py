"""What a trainer adds to a training step: Milepost and pytorch-lightning against the bare loop, in the same process.

    python benchmarks/step_overhead.py [--steps 10000] [--rounds 3] [--json FILE]

A tiny model, so that the framework is nearly all there is to measure. The three run in turn, `rounds` times; the table
gives the median and the spread of microseconds a step over the bare loop, and Milepost's share of Lightning's.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import milepost

OPTIONS: dict[str, Any] = {
    "max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "accelerator": "cpu",
}  # fmt: skip


def loader(steps: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(steps * 2, 4)), batch_size=2)


def module(base: Any) -> Any:
    class Tiny(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.layer(batch[0]).mean()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    return Tiny()


def bare(steps: int, folder: Path) -> None:
    layer = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-6)
    for (batch,) in loader(steps):
        loss = layer(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def with_milepost(steps: int, folder: Path) -> None:
    milepost.Trainer(**OPTIONS, default_root_dir=folder).fit(module(milepost.LightningModule), loader(steps))


def with_lightning(steps: int, folder: Path) -> None:
    trainer = pytorch_lightning.Trainer(**OPTIONS, default_root_dir=folder)
    trainer.fit(module(pytorch_lightning.LightningModule), loader(steps))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    runs: dict[str, list[float]] = {"bare": [], "milepost": [], "lightning": []}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(arguments.rounds):
            for label, run in (("bare", bare), ("milepost", with_milepost), ("lightning", with_lightning)):
                started = time.perf_counter()
                run(arguments.steps, Path(name))
                runs[label].append((time.perf_counter() - started) / arguments.steps * 1e6)
    over = {k: [a - b for a, b in zip(v, runs["bare"], strict=True)] for k, v in runs.items() if k != "bare"}
    ratios = [a / b for a, b in zip(over["milepost"], over["lightning"], strict=True)]
    print(f"{'':12}{'median µs/step':>16}{'min':>9}{'max':>9}")
    for label, values in {"bare loop": runs["bare"], **{f"+ {k}": v for k, v in over.items()}}.items():
        print(f"{label:12}{statistics.median(values):16.1f}{min(values):9.1f}{max(values):9.1f}")
    share = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"milepost's share of lightning's overhead: {share}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"microseconds_per_step": runs, "overhead_ratio": ratios}, indent=2))


if __name__ == "__main__":
    main()
