"""Starting the other ranks: the same command line again, under torch's own launcher."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from milepost.errors import MisconfigurationException

_STARTED = "MILEPOST_STARTED_RANKS"
_PASSED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # to the ranks: SLURM's warning too, which would kill the launcher
_SECONDS_TO_STOP = "600"  # after a signal to the launcher, before it kills ranks: they finish a step and save


def command(devices: int, nodes: int, arguments: list[str]) -> list[str]:
    """The command that runs `arguments`, a whole command line, as `devices` ranks on this of `nodes` machines.

    Raises:
        MisconfigurationException: several machines, and nothing says which this is and where the first one is.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={devices}"]
    if nodes == 1:
        return [*launcher, "--standalone", "--no-python", *arguments]
    told = {name: os.environ.get(name) for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")}
    if None in told.values():
        raise MisconfigurationException(
            f"num_nodes={nodes}: one process cannot start ranks on other machines. Run `torchrun --nnodes={nodes}"
            f" --nproc-per-node={devices} --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT train.py` on each of them, or"
            " set NODE_RANK, MASTER_ADDR and MASTER_PORT on each."
        )
    place = [f"--node-rank={told['NODE_RANK']}", f"--master-addr={told['MASTER_ADDR']}"]
    return [
        *launcher, f"--nnodes={nodes}", *place, f"--master-port={told['MASTER_PORT']}", "--no-python", *arguments
    ]  # fmt: skip


def relaunch(devices: int, nodes: int) -> NoReturn:
    """Give this process's place to torch's launcher, which runs the same command line once for each rank.

    The process keeps its id, so that signals reach the launcher; its memory, and what it held of a GPU, is freed.

    Raises:
        MisconfigurationException: it cannot be run again: an interactive session, a test runner, or standard input.
    """
    arguments = [sys.executable, *sys.orig_argv[1:]]
    remedy = (
        f"Put it into a script and run `torchrun --nproc-per-node={devices} script.py`, or start the function that"
        f" trains with milepost.testing.run_ranks(function, {devices})."
    )
    without_file = len(arguments) < 2 or sys.argv[0] in ("", "-")  # python < script.py, also with options before -
    if hasattr(sys, "ps1") or without_file or "ipykernel" in sys.modules:
        raise MisconfigurationException(f"devices={devices} starts this program {devices} times, but an interactive"
                                        f" session cannot be started again. {remedy}")  # fmt: skip
    if "PYTEST_CURRENT_TEST" in os.environ:
        raise MisconfigurationException(f"devices={devices} starts this program {devices} times, which would run the"
                                        f" tests again. {remedy}")  # fmt: skip
    if _STARTED in os.environ:
        raise MisconfigurationException(
            f"The ranks that were started for devices={devices} are to start ranks themselves: something has removed"
            " RANK and WORLD_SIZE from their environment. Leave the two alone."
        )
    line = command(devices, nodes, arguments)
    os.environ[_STARTED] = str(devices * nodes)
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", _PASSED_ON)
    if "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in os.environ:
        os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", _SECONDS_TO_STOP)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(line[0], line)
