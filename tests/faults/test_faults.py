"""A call of a save that fails: one error that tells all, nothing lost, nothing left over, and the next save works."""

from __future__ import annotations

import collections
import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_scenarios import NoExchange, Quick, memory_directory, same, saved, state

from milepost import Checkpointer
from milepost.errors import CheckpointSaveError
from milepost.testing import Fault, FaultyStore

NUMBERS = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EPERM, errno.EMLINK, errno.EDQUOT]
FORGIVEN = {"link", "remove_file", "remove_directory"}
"""Where a link cannot be made the file is written; what of a replaced checkpoint is left is swept later."""


class QuickNoExchange(Quick, NoExchange):
    pass


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    made = memory_directory(tmp_path)
    yield made
    shutil.rmtree(made)


def found(run: Path) -> int:
    """The version that a new process would go on from; everything there is sound."""
    with Checkpointer(run, threads=1) as c:
        live = state(-1)
        step = c.restore(live)
        for other in c.steps():
            c.verify(other)
        assert step == 0 or same(live, state(live["version"]))
        return int(live["version"]) if step else 0


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def save_breaking(run: Path, step: int, store: FaultyStore, background: bool) -> CheckpointSaveError | None:
    """Save version 3 over faults, then version 4 without, with one checkpointer; returns the error of the first."""
    target = run / f"step-{step:08d}"
    with Checkpointer(run, background=background, threads=1, store=store) as c:
        c.restore(state(0))
        before, told = open_files(), []
        for attempt in (lambda: c.save(step, state(3)), c.wait, c.wait):
            try:
                attempt()
            except CheckpointSaveError as error:
                told.append(error)
        assert store.fault is not None
        forgiven = store.failed is None or store.failed[0] in FORGIVEN
        if not (forgiven and store.fault.lasting):  # else it goes well or not, by what the later calls are
            assert len(told) == (0 if forgiven else 1), store.failed
        assert len(told) <= 1
        assert open_files() == before
        if told:
            assert (told[0].path, told[0].step) == (str(target), step)
            assert isinstance(told[0].__cause__, OSError)
            assert told[0].__cause__.errno == store.fault.number
            assert str(target) in str(told[0]) and os.strerror(store.fault.number) in str(told[0])
        asked = collections.Counter(call for call in store.calls if call[0] in ("finish", "abandon"))
        assert not asked or max(asked.values()) == 1, "a file is made durable once, or never"
        stuck = store.failed == ("sync_directory", str(run)) and store.fault.lasting  # nor can the rename be undone
        assert found(run) in ({2, 3} if stuck else {2} if told else {3})
        store.fault = None
        c.save(step, state(4), wait=True)
    assert found(run) == 4
    assert [path.name for path in run.iterdir() if not path.name.startswith("step-")] == []
    return told[0] if told else None


def calls_of(run: Path, step: int, store: Any) -> int:
    faulty = FaultyStore(None, store)
    saved(run, (step, 3), store=faulty)
    return len(faulty.calls)


@pytest.mark.parametrize("background", [False, True], ids=["now", "in the background"])
@pytest.mark.parametrize(
    ("step", "store"), [(3, Quick), (2, Quick), (2, QuickNoExchange)], ids=["new", "replaced", "without exchange"]
)
def test_each_call_of_a_save_may_fail(root: Path, step: int, store: Callable[[], Any], background: bool) -> None:
    saved(root / "good", (1, 1), (2, 2), store=Quick())
    shutil.copytree(root / "good", root / "count")
    count = calls_of(root / "count", step, store())
    assert count > 20
    errors, methods = 0, set()
    for at in range(count):
        shutil.copytree(root / "good", root / "run")
        number = NUMBERS[(at + step) % len(NUMBERS)]
        fault = Fault(at, number, short=at % 2 == 0, lasting=at % 3 == 0)
        faulty = FaultyStore(fault, store())
        errors += save_breaking(root / "run", step, faulty, background) is not None
        methods |= {faulty.failed[0]} if faulty.failed else set()
        shutil.rmtree(root / "run")
    assert errors > 15
    assert methods >= {"make_directory", "create", "write", "finish", "sync_directory"}


@pytest.mark.parametrize("number", NUMBERS)
def test_each_kind_of_call_fails_with_each_error(root: Path, number: int) -> None:
    """The first call of each kind that replacing a checkpoint makes."""
    saved(root / "good", (1, 1), (2, 2), store=Quick())
    shutil.copytree(root / "good", root / "count")
    counted = FaultyStore(None, Quick())
    saved(root / "count", (2, 3), store=counted)
    first: dict[str, int] = {}
    for at, (method, _) in enumerate(call for call in counted.calls if call[0] != "abandon"):
        first.setdefault(method, at)
    for at in first.values():
        shutil.copytree(root / "good", root / "run")
        save_breaking(root / "run", 2, FaultyStore(Fault(at, number), Quick()), background=False)
        shutil.rmtree(root / "run")


def test_the_first_save_of_all_may_fail(root: Path) -> None:
    for at in range(4):
        store = FaultyStore(Fault(at, errno.ENOSPC), Quick())
        with Checkpointer(root / "deep" / "run", background=False, store=store) as c:
            with pytest.raises(CheckpointSaveError, match="No space left"):
                c.save(1, state(1))
            c.save(1, state(1))
        assert found(root / "deep" / "run") == 1
        shutil.rmtree(root / "deep")


def test_a_short_write_is_gone_on_with(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may write less than it was given, at any place, and says so."""
    real, written = os.pwrite, []

    def short(descriptor: int, data: Any, offset: int) -> int:
        written.append(real(descriptor, memoryview(data)[: 1000 + 7 * len(written)], offset))
        return written[-1]

    monkeypatch.setattr(os, "pwrite", short)
    saved(root / "run", (1, 1))
    monkeypatch.undo()
    assert len(written) > 10 and found(root / "run") == 1


# ---- a disk that is really full --------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command to make a small disk with")
    if done.returncode:
        pytest.skip(f"a small disk needs the right to mount: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_loses_nothing_and_the_next_save_works_once_there_is_space(
    small_disk: Path, background: bool
) -> None:
    run = small_disk / "run"
    saved(run, (1, 1))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1_500_000))
    with Checkpointer(run, background=background) as c:
        big = {**state(2), "big": torch.ones(300_000)}
        with pytest.raises(CheckpointSaveError, match="No space left") as caught:
            c.save(2, big, wait=True)
        assert caught.value.step == 2 and isinstance(caught.value.__cause__, OSError)
        assert found(run) == 1
        filler.unlink()
        c.save(2, state(2), wait=True)
    assert found(run) == 2 and len(list(run.iterdir())) == 2


def test_a_file_that_may_grow_no_further_is_an_error(root: Path) -> None:
    """As a quota would have it: the process may not write files of more than a megabyte."""
    saved(root / "run", (1, 1))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            with Checkpointer(root / "run", background=False, threads=1) as c:
                try:
                    c.save(2, {**state(2), "big": torch.ones(500_000)})
                except CheckpointSaveError as error:
                    cause = error.__cause__
                    code = 0 if isinstance(cause, OSError) and cause.errno == errno.EFBIG else 2
                    c.save(2, state(2))
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert found(root / "run") == 2
