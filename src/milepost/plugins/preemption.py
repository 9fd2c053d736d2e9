"""What a run does when it is told that its machine will be taken away."""

from __future__ import annotations

import signal
from collections.abc import Iterable

from milepost.errors import MisconfigurationException


class Preemption:
    """Which signals ask a run to save and stop. Give it to ``Trainer(plugins=...)`` to change the defaults.

    A signal only sets a flag. At the next step boundary (after a training batch, or on one rank between two batches of
    a validation) the Trainer saves ``hpc_ckpt_<job>_<n>.ckpt``, under SLURM in its `default_root_dir`, elsewhere
    beside the run's checkpoints; waits until it is durable, and stops by raising `SIGTERMException`, which leaves the
    exit status 128 + signal. ``ckpt_path="hpc"`` and ``"auto"`` go on from there. A second signal of the same kind ends
    the process at once.

    Args:
        signals: beside SIGTERM. SLURM sends SIGUSR1 before the time limit where the job asks for it
            (``--signal=SIGUSR1@90``).
        requeue: whether a run under SLURM asks for its job to be queued again (``scontrol requeue``) after it has saved
            for one of `signals`. SIGTERM alone never requeues: it is what cancelling a job sends.
        grace_seconds: where no step boundary comes within this time of the first signal, or the save takes longer, the
            stack of every thread is written to stderr and the process ends: a hung step then says where it hangs. None
            waits for as long as the system lets it.

    Raises:
        MisconfigurationException: a signal that no process can catch, or no signal at all; a grace time of 0 or less.
    """

    def __init__(
        self,
        signals: Iterable[int] = (signal.SIGUSR1,),
        *,
        requeue: bool = True,
        grace_seconds: float | None = None,
    ) -> None:
        self.requeue_signals = tuple(_catchable(number) for number in signals)
        self.requeue = requeue
        if grace_seconds is not None and grace_seconds <= 0:
            raise MisconfigurationException(f"grace_seconds={grace_seconds!r}: give a time above 0, or None.")
        self.grace_seconds = grace_seconds

    @property
    def signals(self) -> tuple[signal.Signals, ...]:
        """All that are watched, each once."""
        return tuple(dict.fromkeys((signal.SIGTERM, *self.requeue_signals)))


class SLURMEnvironment(Preemption):
    """`Preemption` under the name and with the arguments that Lightning's users know."""

    def __init__(self, auto_requeue: bool = True, requeue_signal: int | None = None) -> None:
        super().__init__((signal.SIGUSR1 if requeue_signal is None else requeue_signal,), requeue=auto_requeue)


def _catchable(number: int) -> signal.Signals:
    try:
        found = signal.Signals(number)
    except ValueError:
        found = None
    if found is None or found in (signal.SIGKILL, signal.SIGSTOP):
        raise MisconfigurationException(
            f"signals={number!r}: not a signal that a process can catch. Use for example signal.SIGUSR1, signal.SIGHUP."
        )
    return found
