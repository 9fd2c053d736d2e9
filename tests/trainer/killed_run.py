"""Training jobs in processes of their own, for test_exact_resume: each is killed where it is told, and run again.

The unbroken run comes first, in this process. Every other job is a fork of it, and so spared the seconds that importing
takes. Prints, as JSON, how each ended, the step at which its second run went on, and a digest of what that came to.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from test_exact_resume import Net, Points
from torch.utils.data import DataLoader

from milepost import Trainer
from milepost.callbacks import Callback, ModelCheckpoint
from milepost.plugins import TorchCheckpointIO


def die(*arguments: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


class Kill(Callback):
    """Kills the process at the n-th time that a hook is called."""

    def __init__(self, hook: str, at: int) -> None:
        self.hook, self.left, self.resumed_at = hook, at, 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.resumed_at = trainer.global_step

    def _reach(self, hook: str) -> None:
        self.left -= hook == self.hook
        if self.left == 0 and hook == self.hook:
            die()

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        self._reach("accumulation" if trainer.fit_loop.accumulating else "other")

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self._reach("zero_grad")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self._reach("step")

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._reach("validation" if batch_idx == 1 and not trainer.sanity_checking else "other")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._reach("epoch_end")


class DyingIO(TorchCheckpointIO):
    """Kills the process in the n-th save: the bytes are written, they are not durable, and the name is not there."""

    def __init__(self, at: int) -> None:
        self.left = at

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.left -= 1
        if self.left == 0:
            os.fsync = die
        super().save_checkpoint(checkpoint, path, storage_options)


def train(folder: Path, hook: str, at: int) -> dict[str, Any]:
    torch.manual_seed(11)
    net, kill = Net(), Kill(hook, at)
    trainer = Trainer(
        max_epochs=4, accumulate_grad_batches=3, val_check_interval=4, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, plugins=DyingIO(at if hook == "save" else 0),
        callbacks=[kill, ModelCheckpoint(dirpath=folder, every_n_train_steps=2, save_last=True)],
    )  # fmt: skip
    data = DataLoader(Points(True), batch_size=3, shuffle=True)
    trainer.fit(net, data, DataLoader(Points(False), batch_size=8), ckpt_path="auto")
    digest = hashlib.sha256()
    moments = (value for state in trainer.optimizers[0].state.values() for value in state.values())
    for tensor in [*net.state_dict().values(), *moments, torch.get_rng_state()]:
        digest.update(tensor.detach().numpy().tobytes())
    return {"resumed_at": kill.resumed_at, "digest": digest.hexdigest()}


def in_a_process(folder: Path, hook: str, at: int) -> tuple[int, dict[str, Any]]:
    """Run `train` in a child. Returns how it ended, and what it came to where it lived."""
    child = os.fork()
    if child == 0:
        result = train(folder, hook, at)
        (folder / "result.json").write_text(json.dumps(result))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    result = folder / "result.json"
    return os.waitstatus_to_exitcode(status), json.loads(result.read_text()) if result.exists() else {}


if __name__ == "__main__":
    root = Path(sys.argv[1])
    report: dict[str, Any] = {"never": train(root / "never", "never", 0)}
    kills = {"accumulation": 11, "step": 7, "zero_grad": 6, "validation": 3, "epoch_end": 2, "save": 5}
    for hook, at in kills.items():
        folder = root / hook
        folder.mkdir(parents=True)
        killed, _ = in_a_process(folder, hook, at)
        again, result = in_a_process(folder, "never", 0)
        report[hook] = {"killed": killed, "again": again, **result}
    print(json.dumps(report))
