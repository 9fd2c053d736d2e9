"""One training job, for test_signals: sends itself, or its whole process group, what it is told to, in one batch."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

import torch
from test_exact_resume import Net, loader

from milepost import Trainer
from milepost.callbacks import Callback, ModelCheckpoint
from milepost.plugins import Preemption

FOLDER, WHAT = sys.argv[1], sys.argv[2]


class Send(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != 3:
            return
        print("sent", flush=True)
        if WHAT == "twice":
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        elif WHAT == "group":
            os.killpg(os.getpgid(0), signal.SIGTERM)
        elif WHAT == "hang":
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for_what_never_comes()


def wait_for_what_never_comes() -> None:
    threading.Event().wait()


torch.manual_seed(3)
trainer = Trainer(
    max_epochs=2, accumulate_grad_batches=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
    default_root_dir=FOLDER, plugins=[Preemption(grace_seconds=0.5 if WHAT == "hang" else None)],
    callbacks=[Send(), ModelCheckpoint(dirpath=FOLDER, every_n_epochs=0, save_last=False)],
)  # fmt: skip
trainer.fit(Net(), loader("shuffle", 2, True), ckpt_path="auto")
