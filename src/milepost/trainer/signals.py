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

from milepost import _distributed
from milepost.plugins.preemption import Preemption
from milepost.trainer.places import requeue_directory

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer


class SignalFlags:
    """Watches the signals of a `Preemption` for the duration of a run. Outside the main thread it watches none."""

    def __init__(self, preemption: Preemption) -> None:
        self.preemption = preemption
        self._previous: dict[int, Any] = {}
        self.received: list[int] = []
        self.told: list[int] = []  # those that another rank has received

    def __enter__(self) -> SignalFlags:
        self.received, self.told = [], []
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
        return 128 + (self.received or self.told)[0]

    @property
    def requeue_asked(self) -> bool:
        return any(number in self.preemption.requeue_signals for number in (*self.received, *self.told))


def save_for_requeue(trainer: Trainer) -> str | None:
    """Save where a signal has asked the run to stop; under SLURM queue the job again. Returns the path of the file.

    Called at a step boundary, on many ranks at the same one. Once the file is durable, those that earlier stops of this
    job left are removed, save the one that this run went on from. A Trainer without checkpointers saves only where its
    job is to be queued again.
    """
    job = os.environ.get("SLURM_JOB_ID")
    # Ranks may have been sent different signals.
    asked = job is not None and any(_distributed.all_gather_objects(trainer.signals.requeue_asked))
    requeue = asked and trainer.signals.preemption.requeue
    if not trainer.checkpoint_callbacks and not requeue:
        return None
    place = requeue_directory(trainer)
    earlier, path = _distributed.on_rank_zero(lambda: _files(place))
    pending = trainer.save_checkpoint(path)
    if trainer.strategy.saves_on_every_rank:
        pending.result()
    else:  # rank 0 alone writes, perhaps in the background
        _distributed.on_rank_zero(pending.result)
    for old in earlier:
        if old != trainer.ckpt_path:
            trainer.strategy.remove_checkpoint(old)
    if requeue and trainer.is_global_zero:
        _requeue(str(job))
    trainer.strategy.barrier()  # a launcher kills those that are left as soon as one rank has ended
    return path


def requeue_files(trainer: Trainer) -> list[str]:
    """The files that this run may have written for requeueing: under SLURM those of this job.

    Elsewhere those beside its checkpoints, and those in `default_root_dir` that bear no job's name.
    """
    unnamed = [] if "SLURM_JOB_ID" in os.environ else _numbered(trainer.default_root_dir, "")
    return [*unnamed, *_own(requeue_directory(trainer))]


def is_requeue_file(path: str) -> bool:
    """Whether its name is that of a file which this job writes for requeueing."""
    return re.fullmatch(rf"hpc_ckpt_{re.escape(_job())}_\d+\.ckpt", Path(path).name) is not None


def _job() -> str:
    return os.environ.get("SLURM_JOB_ID", "local")


def _own(directory: str) -> list[str]:
    return _numbered(directory, f"{_job()}_")


def _numbered(directory: str | os.PathLike[str], key: str) -> list[str]:
    """Files for requeueing in `directory` whose names have `key`, the oldest number first."""
    place, pattern = Path(directory), re.compile(rf"hpc_ckpt_{re.escape(key)}(\d+)\.ckpt")
    if not place.is_dir():
        return []
    numbered = ((match, entry) for entry in place.iterdir() if (match := pattern.fullmatch(entry.name)))
    return [str(entry) for match, entry in sorted(numbered, key=lambda pair: int(pair[0].group(1)))]


def _files(place: str) -> tuple[list[str], str]:
    """The files of earlier stops in `place`, and the path of the one to come."""
    earlier = _own(place)
    return earlier, _next_path(place, earlier)


def _next_path(directory: str, earlier: list[str]) -> str:
    number = int(Path(earlier[-1]).stem.rpartition("_")[2]) + 1 if earlier else 1
    Path(directory).mkdir(parents=True, exist_ok=True)
    return str(Path(directory) / f"hpc_ckpt_{_job()}_{number}.ckpt")


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
