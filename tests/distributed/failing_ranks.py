"""Two ranks save together over gloo, and one is killed, stopped or out of space at one point of the save.

As a command, ``python tests/distributed/failing_ranks.py``, it goes through every point and says how long the other
rank waited. The rendezvous store lives in a third process, as torchrun's does, so that no rank's death ends it.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from milepost import Checkpointer, PerRank
from milepost.errors import CheckpointSaveError
from milepost.storage.store import LocalStore

DEADLINE_SECONDS = 1.0
LIMIT_SECONDS = 60.0
POINTS = {  # by rank: what is called there, and a part of its path
    0: {
        "come": None, "begin": ("make_directory", ""), "create": ("create", ".safetensors"),
        "write": ("write", ".safetensors"), "fsync": ("finish", ".safetensors"), "head": ("create", "manifest.json"),
        "commit": ("sync_directory", ".pending-"), "rename": ("rename", ".pending-"),
    },
    1: {
        "come": None, "create": ("create", ".safetensors"), "write": ("write", ".safetensors"),
        "fsync": ("finish", ".safetensors"), "vote": ("sync_directory", ".pending-"),
    },
}  # fmt: skip


class Scenario(NamedTuple):
    rank: int
    point: str
    what: str
    hosts: bool = False  # whether the store lives in rank 0, as without torchrun

    @property
    def name(self) -> str:
        return f"{self.rank}-{self.point}-{self.what}{'-hosting' if self.hosts else ''}"


ALL = [
    Scenario(rank, point, what)
    for rank, points in POINTS.items()
    for point in points
    for what in ("kill", "stop", "full")
    if (point, what) != ("come", "full")
] + [Scenario(0, point, what, hosts=True) for point in ("head", "rename") for what in ("kill", "stop")]


def strike(what: str) -> None:
    if what == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    # to this thread: one to the process may be taken up by another thread a little later
    signal.pthread_kill(threading.get_ident(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)


class Striking(LocalStore):
    """The real file system, up to the call at which it strikes, once."""

    def __init__(self) -> None:
        super().__init__()
        self.scenario: Scenario | None = None
        self._names: dict[int, str] = {}

    def _called(self, method: str, path: str) -> None:
        scenario = self.scenario
        point = POINTS[scenario.rank][scenario.point] if scenario else None
        if scenario and point and point[0] == method and point[1] in path:
            self.scenario = None
            strike(scenario.what)

    def make_directory(self, path: str) -> None:
        self._called("make_directory", path)
        super().make_directory(path)

    def create(self, path: str, size: int) -> int:
        self._called("create", path)
        descriptor = super().create(path, size)
        self._names[descriptor] = path
        return descriptor

    def write(self, descriptor: int, data: memoryview, offset: int) -> None:
        self._called("write", self._names[descriptor])
        super().write(descriptor, data, offset)

    def finish(self, descriptor: int, size: int) -> None:
        try:
            self._called("finish", self._names[descriptor])
        except OSError:
            self.abandon(descriptor)
            raise
        super().finish(descriptor, size)

    def rename(self, source: str, target: str) -> None:
        self._called("rename", source)
        super().rename(source, target)

    def sync_directory(self, path: str) -> None:
        self._called("sync_directory", path)
        super().sync_directory(path)


class Coming:
    """Part of the state: its rank does not come to the save."""

    per_rank = True
    what: str | None = None

    def state_dict(self) -> dict[str, Any]:
        if self.what is not None:
            strike(self.what)
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def one_rank(rank: int, port: int, folder: Path, scenario: Scenario) -> dict[str, Any]:
    if scenario.hosts and rank == 0:
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        folder.with_suffix(".port").write_text(str(store.port))
    else:
        while scenario.hosts and not (port := _port(folder)):
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    dist.barrier()
    group = dist.distributed_c10d._get_default_group()
    collectives = group._get_sequence_number_for_group()
    assert collectives > 0, "it counts them"
    calls, coming = Striking(), Coming()
    live = {"model": {"w": torch.ones(400, 500), "b": torch.zeros(9)}, "own": PerRank(rank), "coming": coming}
    c = Checkpointer(folder, threads=1, store=calls, rank_deadline_seconds=DEADLINE_SECONDS)
    c.save(1, live, wait=True)
    if rank == scenario.rank:
        calls.scenario = scenario
        coming.what = scenario.what if scenario.point == "come" else None
    live["model"]["w"] += 1
    begun, end = time.monotonic(), {}
    try:
        c.save(2, live, wait=True)
    except CheckpointSaveError as error:
        end = {"error": str(error), "rank": error.rank, "step": error.step}
    end["collectives"] = group._get_sequence_number_for_group() - collectives
    end["seconds"] = time.monotonic() - begun
    return end


def _port(folder: Path) -> int:
    path = folder.with_suffix(".port")
    return int(path.read_text() or 0) if path.exists() else 0


def forked(act: Callable[[], Any], result: Path) -> int:
    """A child that writes what `act` returned."""
    child = os.fork()
    if child == 0:
        try:
            made = act()
            result.write_text(json.dumps(made))
        except BaseException:
            result.with_suffix(".failed").write_text(traceback.format_exc())
        finally:
            os._exit(0)
    return child


def ended(child: int, until: float) -> str:
    """How a child ended: exit, kill, stop (and it stays stopped), or hung, and then it is killed."""
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
        if found and os.WIFSTOPPED(status):
            return "stop"
        if found:
            return "kill" if os.WIFSIGNALED(status) else "exit"
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hung"


def run(folder: Path, scenario: Scenario) -> dict[str, Any]:
    """One scenario, to its end: the one that was stopped goes on once the other one has ended."""
    torch.set_num_threads(1)
    server = None if scenario.hosts else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = 0 if server is None else server.port
    folder.mkdir()
    results = [folder.with_name(f"{folder.name}.{rank}.json") for rank in range(2)]
    children = [forked(lambda rank=rank: one_rank(rank, port, folder, scenario), results[rank]) for rank in range(2)]
    until = time.monotonic() + LIMIT_SECONDS
    ends = {rank: ended(children[rank], until) for rank in (1 - scenario.rank, scenario.rank)}
    if ends[scenario.rank] == "stop":
        os.kill(children[scenario.rank], signal.SIGCONT)
        ends[scenario.rank] = f"stop, {ended(children[scenario.rank], time.monotonic() + LIMIT_SECONDS)}"
    found = {}
    for rank, path in enumerate(results):
        failed = path.with_suffix(".failed")
        said = json.loads(path.read_text()) if path.exists() else {}
        found[str(rank)] = {"end": ends[rank], "trace": failed.read_text() if failed.exists() else None, **said}
    return found


def run_all(folder: Path, scenarios: list[Scenario], at_once: int = 4) -> dict[str, Any]:
    """By name of the scenario and rank, how it ended."""
    waiting, running = list(scenarios), dict[int, Scenario]()
    while waiting or running:
        while waiting and len(running) < at_once:
            scenario = waiting.pop(0)
            child = forked(lambda s=scenario: run(folder / s.name, s), folder / f"{scenario.name}.end.json")
            running[child] = scenario
        child, _ = os.wait()
        del running[child]
    return {s.name: json.loads((folder / f"{s.name}.end.json").read_text()) for s in scenarios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", nargs="*", help="rank-point-what; all where left out")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="milepost-"))
    folder.mkdir(parents=True, exist_ok=True)
    scenarios = [s for s in ALL if given.only is None or s.name in given.only]
    found = run_all(folder, scenarios)
    (folder / "found.json").write_text(json.dumps(found))
    waited = [e["seconds"] for ends in found.values() for e in ends.values() if "error" in e and e["end"] == "exit"]
    told = sum("error" in e for ends in found.values() for e in ends.values())
    print(
        f"{len(found)} saves of two ranks with one struck down, deadline {DEADLINE_SECONDS} s: {told} errors told, the"
        f" latest {max(waited):.1f} s after save was called; checkpoints are in {folder}."
    )


if __name__ == "__main__":
    sys.exit(main())
