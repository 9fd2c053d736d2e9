"""What is done to a directory of checkpoints while the calls are recorded, and what must hold after a crash.

As a command, ``python tests/faults/crash_scenarios.py``, it goes through all crash states of all scenarios.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from milepost import Checkpointer
from milepost.storage.store import LocalStore
from milepost.testing import CrashState, RecordingStore, crash_states


def state(version: int) -> dict[str, Any]:
    """A state in which every byte of some tensors tells the version, and others never change."""
    return {
        "model": {"frozen": torch.arange(3000.0), "trained": torch.full((500,), float(version))},
        "optimizer": [torch.full((100,), float(version)), {"step": version}],
        "version": version,
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


class NoExchange(LocalStore):
    """A file system that cannot swap two directories."""

    def exchange(self, one: str, other: str) -> None:
        raise OSError(errno.ENOTSUP, "no exchange", other)


class Quick(LocalStore):
    """Nothing made durable: what the checks write in a directory that is thrown away need not be."""

    def finish(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)
        self.abandon(descriptor)

    def sync_directory(self, path: str) -> None:
        pass


def checkpointer(directory: Path, store: Any = None) -> Checkpointer:
    return Checkpointer(directory, background=False, threads=1, store=store or LocalStore())


def saved(directory: Path, *steps: tuple[int, int], store: Any = None) -> None:
    """Save (step, version), one after the other."""
    with checkpointer(directory, store) as c:
        for step, version in steps:
            c.save(step, state(version))


@dataclass(frozen=True)
class Scenario:
    """
    Attributes:
        before: brings the directory to where it is when the recording begins.
        act: what is recorded. It sets marks.
        allowed: the versions that may be found after a crash, given the marks set before it. 0: no checkpoint.
        store: the file system that the recorded calls go to.
    """

    name: str
    before: Callable[[Path], None]
    act: Callable[[Path, RecordingStore], None]
    allowed: Callable[[set[str]], set[int]]
    store: Callable[[], Any] = LocalStore


def save(step: int, version: int) -> Callable[[Path, RecordingStore], None]:
    def act(directory: Path, store: RecordingStore) -> None:
        with checkpointer(directory, store) as c:
            c.restore(state(0))  # so that the save may link what is unchanged
            c.save(step, state(version))
            store.mark("saved")

    return act


def remove(directory: Path, store: RecordingStore) -> None:
    with checkpointer(directory, store) as c:
        c.remove(2)
        store.mark("removed")


def save_and_retain(directory: Path, store: RecordingStore) -> None:
    with checkpointer(directory, store) as c:
        c.restore(state(0))
        c.save(3, state(3))
        store.mark("saved")
        c.remove(1)
        c.remove(2)
        c.save(4, state(4))
        store.mark("saved 4")


def replace_and_remove(directory: Path, store: RecordingStore) -> None:
    with checkpointer(directory, store) as c:
        c.save(2, state(3))
        store.mark("saved")
        c.remove(2)
        store.mark("removed")


def two_at_once(directory: Path, store: RecordingStore) -> None:
    def run(step: int) -> None:
        with checkpointer(directory, store) as c:
            c.restore(state(0))
            c.save(step, state(step))
            store.mark(f"saved {step}")

    threads = [threading.Thread(target=run, args=(step,)) for step in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Killed(BaseException):
    pass


class Dying:
    """Passes calls on until one of them has been made; that and all later ones then end the saver."""

    def __init__(self, store: RecordingStore, last: str) -> None:
        self._store, self._last, self._dead = store, last, False

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> Any:
            if self._dead:
                raise Killed
            result = getattr(self._store, name)(*given)
            self._dead = name == self._last
            if self._dead:
                raise Killed
            return result

        return call


def killed_then_swept(last: str) -> Callable[[Path, RecordingStore], None]:
    """A saver is killed at its first call of a kind, another process cleans up, and then the power goes."""

    def act(directory: Path, store: RecordingStore) -> None:
        try:
            saved(directory, (2, 3), store=Dying(store, last))
        except Killed:
            pass
        with checkpointer(directory, store) as c:
            live = state(0)
            c.restore(live)
            store.mark(f"found {live['version']}")

    return act


def _two(marks: set[str]) -> set[int]:
    if "saved 3" in marks:
        return {3}
    return {2, 3} if "saved 2" in marks else {1, 2, 3}


def _first_then(old: set[int], new: set[int], mark: str = "saved") -> Callable[[set[str]], set[int]]:
    return lambda marks: new if mark in marks else old


def _nothing(directory: Path) -> None:
    pass


def _one(directory: Path) -> None:
    saved(directory, (1, 1))


def _one_and_two(directory: Path) -> None:
    saved(directory, (1, 1), (2, 2))


def _replace_then_remove(marks: set[str]) -> set[int]:
    if "removed" in marks:
        return {1}
    return {3, 1} if "saved" in marks else {2, 3}


def _found(marks: set[str]) -> set[int]:
    return {2}


SCENARIOS = [
    Scenario("first save", _nothing, save(1, 1), _first_then({0, 1}, {1})),
    Scenario("later save, part of it linked", _one_and_two, save(3, 3), _first_then({2, 3}, {3})),
    Scenario("later save, nothing changed", _one, save(2, 1), _first_then({1}, {1})),
    Scenario("the same step replaced", _one_and_two, save(2, 3), _first_then({2, 3}, {3})),
    Scenario("replaced without exchange", _one_and_two, save(2, 3), _first_then({2, 3}, {3}), NoExchange),
    Scenario("removed", _one_and_two, remove, _first_then({1, 2}, {1}, "removed")),
    Scenario(
        "retention",
        _one_and_two,
        save_and_retain,
        lambda marks: {4} if "saved 4" in marks else {3, 4} if "saved" in marks else {2, 3},
    ),
    Scenario("replaced and removed", _one_and_two, replace_and_remove, _replace_then_remove),
    Scenario("the same without exchange", _one_and_two, replace_and_remove, _replace_then_remove, NoExchange),
    Scenario("killed while replacing", _one_and_two, killed_then_swept("exchange"), lambda marks: {2, 3}),
    Scenario("killed with the old one aside", _one_and_two, killed_then_swept("rename"), _found, NoExchange),
    Scenario("killed while removing the old", _one_and_two, killed_then_swept("remove_file"), lambda marks: {2, 3}),
    Scenario("two savers at once", _one, two_at_once, _two),
]


def recorded(scenario: Scenario, root: Path) -> RecordingStore:
    """Run a scenario in ``root/run``, which is made by it."""
    root.mkdir()
    scenario.before(root / "run")
    store = RecordingStore(root, scenario.store())
    scenario.act(root / "run", store)
    return store


def check(found: CrashState, allowed: set[int], directory: Path) -> None:
    """Lay out a state and go on from it as a user would: resume, save, resume."""
    found.write_to(directory)
    run = directory / "run"
    quick = Quick()
    with warnings.catch_warnings(), checkpointer(run, quick) as c:
        warnings.simplefilter("error")  # "passing over the damaged checkpoint": there must be none
        live = state(-1)
        step = c.restore(live)
        version = live["version"] if step else 0
        assert version in allowed, f"version {version} of {allowed}, {found}"
        assert not step or same(live, state(version)), f"a torn checkpoint, {found}"
        c.save(9, state(9))
        left = sorted(p.name for p in run.iterdir() if not p.name.startswith("step-"))
        assert not left, f"{left} is left over, {found}"
        assert c.restore(live) == 9 and same(live, state(9)), f"the next save is not whole, {found}"
        for other in c.steps():
            c.verify(other)


def check_all(scenario: Scenario, root: Path, states: Iterable[CrashState]) -> int:
    count = 0
    for found in states:
        count += 1
        try:
            check(found, scenario.allowed(set(found.marks)), root / "state")
        except Exception as error:
            error.add_note(f"In the scenario {scenario.name!r}, crashed {found}")
            raise
        shutil.rmtree(root / "state")
    return count


def memory_directory(parent: Path | None = None) -> Path:
    """A directory in memory where there is one: the states are many and none has to last."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="milepost-", dir=shared if shared.is_dir() else parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reorderings", type=int, default=2)
    parser.add_argument("--samples", type=int, default=100, help="drawn for each prefix, beyond the reorderings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=10**9, help="states of each scenario")
    given = parser.parse_args()
    total = 0
    for scenario in SCENARIOS:
        root = memory_directory()
        begun = time.monotonic()
        store = recorded(scenario, root / "recorded")
        states = crash_states(store, reorderings=given.reorderings, samples=given.samples, seed=given.seed)
        limited = (found for found, _ in zip(states, range(given.limit), strict=False))
        count = check_all(scenario, root, limited)
        total += count
        print(f"{scenario.name:32} {len(store.log):4} operations {count:7} states, each sound"
              f" {time.monotonic() - begun:7.1f} s", flush=True)  # fmt: skip
        shutil.rmtree(root)
    print(f"{total} states")


if __name__ == "__main__":
    sys.exit(main())
