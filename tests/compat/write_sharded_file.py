"""Writes ``sharded_lightning``: what pytorch-lightning 2.6.6 saves sharded, from two ranks.

python tests/compat/write_sharded_file.py
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

TARGET = Path(__file__).parent / "sharded_lightning"


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"lr": 0.1})
        self.l = torch.nn.Linear(4, 2)

    def configure_model(self) -> None:
        fully_shard(self.l, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.l(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def main() -> None:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    if trainer.global_rank == 0:
        shutil.rmtree(TARGET, ignore_errors=True)
    module = Module()
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=2))
    trainer.save_checkpoint(TARGET)
    print(module.l.weight.full_tensor())


if __name__ == "__main__":
    main()
