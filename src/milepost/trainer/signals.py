"""Signals set flags; the loops act on them at a step boundary. Nothing else happens inside a handler."""

from __future__ import annotations

import faulthandler
import os
import re
import shutil
import signal
import subprocess
import threading
import warnings
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from milepost.plugins.preemption import Preemption

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer


class SignalFlags:
    """Watches the signals of a `Preemption` for the duration of a run. Outside the main thread it watches none."""

    def __init__(self, preemption: Preemption) -> None:
        self.preemption = preemption
        self._previous: dict[int, Any] = {}
        self.received: list[int] = []

    def __enter__(self) -> SignalFlags:
        self.received = []
        if threading.current_thread() is threading.main_thread():
            for number in self.preemption.signals:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}
        if self.received and self.preemption.grace_seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in self.received:  # a second one: whoever sends it does not want to wait
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.received and self.preemption.grace_seconds is not None:
            # a watchdog in C: it fires even where the interpreter is stuck inside one call
            faulthandler.dump_traceback_later(self.preemption.grace_seconds, exit=True)
        self.received.append(number)

    @property
    def exit_status(self) -> int:
        """As a shell gives it: a job that was stopped must not look like one that is finished."""
        return 128 + self.received[0]

    @property
    def requeue_asked(self) -> bool:
        return any(number in self.preemption.requeue_signals for number in self.received)


def save_for_requeue(trainer: Trainer) -> str | None:
    """Save where a signal has asked the run to stop; under SLURM queue the job again. Returns the path of the file.

    Called at a step boundary. Once the file is durable, those that earlier stops of this job left are removed, save the
    one that this run went on from. A Trainer without checkpointers saves only where its job is to be queued again.
    """
    job = os.environ.get("SLURM_JOB_ID")
    requeue = job is not None and trainer.signals.requeue_asked and trainer.signals.preemption.requeue
    if not trainer.checkpoint_callbacks and not requeue:
        return None
    earlier = requeue_files(trainer.default_root_dir)
    path = _next_path(trainer.default_root_dir, earlier)
    trainer.save_checkpoint(path).result()
    for old in earlier:
        if old != trainer.ckpt_path:
            trainer.strategy.remove_checkpoint(old)
    if requeue and trainer.is_global_zero:
        _requeue(str(job))
    return path


def requeue_files(directory: str | os.PathLike[str]) -> list[str]:
    """The files written for requeueing in `directory`, oldest number first; under SLURM only those of this job."""
    place, job = Path(directory), os.environ.get("SLURM_JOB_ID")
    key = f"{re.escape(job)}_" if job else "(?:local_)?"
    pattern = re.compile(rf"hpc_ckpt_{key}(\d+)\.ckpt")
    if not place.is_dir():
        return []
    numbered = ((match, entry) for entry in place.iterdir() if (match := pattern.fullmatch(entry.name)))
    return [str(entry) for match, entry in sorted(numbered, key=lambda pair: int(pair[0].group(1)))]


def _next_path(directory: str, earlier: list[str]) -> str:
    number = int(Path(earlier[-1]).stem.rpartition("_")[2]) + 1 if earlier else 1
    Path(directory).mkdir(parents=True, exist_ok=True)
    return str(Path(directory) / f"hpc_ckpt_{os.environ.get('SLURM_JOB_ID', 'local')}_{number}.ckpt")


def _requeue(job: str) -> None:
    """Ask SLURM for the job to be queued again. A refusal is a warning: the checkpoint is there in any case."""
    command = shutil.which("scontrol")
    if command is None:
        warnings.warn(f"SLURM job {job} cannot be queued again: there is no `scontrol` on the PATH.", stacklevel=2)
        return
    done = subprocess.run([command, "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        warnings.warn(
            f"`scontrol requeue {job}` failed with status {done.returncode}: {done.stderr.strip()}. The checkpoint is"
            " saved; submit the job again with ckpt_path='hpc'.",
            stacklevel=2,
        )
