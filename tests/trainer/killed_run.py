"""One training job, for test_exact_resume: resumes what is there, kills itself where it is told, prints a digest."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from test_exact_resume import Net, Points
from torch.utils.data import DataLoader

from milepost import Trainer
from milepost.callbacks import Callback, ModelCheckpoint
from milepost.plugins import TorchCheckpointIO

FOLDER, (WHAT, *AT) = Path(sys.argv[1]), sys.argv[2].split()


class Kill(Callback):
    def __init__(self) -> None:
        self.batches = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        print(f"resumed at step {trainer.global_step}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1
        if WHAT == "batch" and self.batches == int(AT[0]):
            os.kill(os.getpid(), signal.SIGKILL)


class DyingIO(TorchCheckpointIO):
    saves = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        DyingIO.saves += 1
        if WHAT == "save" and DyingIO.saves == int(AT[0]):
            half = Path(f"{path}.pending")  # what a process killed in mid-write leaves behind
            half.write_bytes(b"PK" * 1000)
            os.kill(os.getpid(), signal.SIGKILL)
        super().save_checkpoint(checkpoint, path, storage_options)


torch.manual_seed(11)
net = Net()
trainer = Trainer(
    max_epochs=4, accumulate_grad_batches=3, val_check_interval=4, logger=False, enable_progress_bar=False,
    enable_model_summary=False, default_root_dir=FOLDER, plugins=DyingIO(),
    callbacks=[Kill(), ModelCheckpoint(dirpath=FOLDER, every_n_train_steps=2, save_last=True)],
)  # fmt: skip
data = DataLoader(Points(True), batch_size=3, shuffle=True)
trainer.fit(net, data, DataLoader(Points(False), batch_size=8), ckpt_path="auto")
digest = hashlib.sha256()
for tensor in [*net.state_dict().values(), *(v for s in trainer.optimizers[0].state.values() for v in s.values())]:
    digest.update(tensor.detach().numpy().tobytes())
digest.update(torch.get_rng_state().numpy().tobytes())
print(digest.hexdigest())
