"""Several at once on one directory: what docs/format.md says of them under "Several at once"."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from crash_scenarios import NoExchange, memory_directory, same, state

from milepost import Checkpointer
from milepost.engine.directory import DirectoryEngine
from milepost.engine.retention import KeepNewest
from milepost.errors import CheckpointCorruptError, CheckpointNotFoundError
from milepost.storage.store import LocalStore


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    made = memory_directory(tmp_path)
    yield made
    shutil.rmtree(made)


def forked(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def ended(*children: int) -> None:
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * len(children)


def save_versions(run: Path, steps: list[int], store: Any = None, **arguments: Any) -> None:
    with Checkpointer(run, threads=1, store=store, **arguments) as c:
        for step in steps:
            c.save(step, state(step))


@pytest.mark.parametrize("background", [False, True])
def test_two_processes_save_different_steps(root: Path, background: bool) -> None:
    savers = [
        forked(lambda first=first: save_versions(root / "run", list(range(first, 40, 2)), background=background))
        for first in (1, 2)
    ]
    ended(*savers)
    with Checkpointer(root / "run") as c:
        assert c.steps() == list(range(1, 40))
        for step in c.steps():
            assert same(c.load(step), state(step))
    assert len(list((root / "run").iterdir())) == 39


def test_a_saver_links_nothing_of_a_checkpoint_that_another_one_has_put_in_the_place_of_its_own(root: Path) -> None:
    """The files have the same names and sizes, and what is linked would be another's."""
    with Checkpointer(root / "run", background=False, threads=1) as one:
        one.save(1, state(1))
        with Checkpointer(root / "run", background=False, threads=1) as other:
            other.save(1, state(2))
        one.save(2, state(1))
        assert same(one.load(2), state(1)) and same(one.load(1), state(2))
        one.verify(2)


def test_a_name_of_a_checkpoint_that_leads_nowhere_is_none(root: Path) -> None:
    save_versions(root / "run", [1])
    (root / "run" / "step-00000002").symlink_to("nowhere")
    with Checkpointer(root / "run") as c:
        assert c.steps() == [1] and c.restore(state(0)) == 1


_GAP = pytest.mark.xfail(
    strict=False, reason="two savers of one name without exchange: one may take away what the other has just put aside"
)


@pytest.mark.parametrize("store", [LocalStore, pytest.param(NoExchange, marks=_GAP)])
def test_two_processes_save_the_same_step_again_and_again(root: Path, store: Callable[[], Any]) -> None:
    """Each save is whole, none fails, and readers meanwhile find one of them, whole."""

    def work(version: int) -> None:
        with Checkpointer(root / "run", background=False, threads=1, store=store()) as c:
            for _ in range(25):
                c.save(1, state(version))

    work(1)
    savers = [forked(lambda version=version: work(version)) for version in (1, 2)]
    seen = set()
    with Checkpointer(root / "run", threads=1, store=store()) as c:
        for _ in range(40):
            live = state(0)
            assert c.restore(live) == 1
            assert same(live, state(live["version"]))
            seen.add(live["version"])
    ended(*savers)
    assert seen <= {1, 2}
    with Checkpointer(root / "run", threads=1) as c:
        assert c.steps() == [1]
    assert [path.name for path in (root / "run").iterdir()] == ["step-00000001"]


def test_a_reader_beside_a_saver_that_prunes(root: Path) -> None:
    """`restore` always finds a whole one, at least as new as what was there before; a load finds it whole or not."""
    save_versions(root / "run", [1])
    saver = forked(lambda: save_versions(root / "run", list(range(2, 80)), background=False, keep=KeepNewest(1)))
    newest = 0
    with Checkpointer(root / "run", threads=1) as c:
        while newest < 79:
            live = state(0)
            step = c.restore(live)
            assert step >= max(newest, 1) and same(live, state(step))
            newest = step
            for other in c.steps():
                try:
                    assert same(c.load(other), state(other))
                except CheckpointNotFoundError:
                    pass
    ended(saver)


def in_the_middle_of_reading(root: Path, change: Callable[[DirectoryEngine, Path], None]) -> dict[str, Any]:
    """Load a checkpoint that changes once its head and tree have been read, and before its tensors are."""
    engine, path = DirectoryEngine(threads=1), root / "c"
    engine.save(path, state(1), background=False)
    original, changed = DirectoryEngine.read_tensors, threading.Event()

    class Slow(DirectoryEngine):
        def read_tensors(self, *given: Any, **named: Any) -> Any:
            if not changed.is_set():
                changed.set()
                change(engine, path)
            return original(self, *given, **named)

    return Slow(threads=1).load(path)


def test_a_reader_of_a_checkpoint_that_is_replaced_gives_the_new_one(root: Path) -> None:
    loaded = in_the_middle_of_reading(root, lambda engine, path: engine.save(path, state(2), background=False))
    assert same(loaded, state(2))


def test_a_reader_of_a_checkpoint_that_is_removed_does_not_call_it_damaged(root: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        in_the_middle_of_reading(root, lambda engine, path: engine.remove(path))


def test_a_reader_of_a_damaged_checkpoint_does_not_read_it_twice(root: Path) -> None:
    def damage(engine: DirectoryEngine, path: Path) -> None:
        blob = path / "model.safetensors"
        blob.chmod(0o644)
        blob.write_bytes(bytes(blob.stat().st_size))

    with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors is damaged"):
        in_the_middle_of_reading(root, damage)


def test_a_process_that_lists_leaves_a_save_under_way_alone(root: Path) -> None:
    """The lock of a pending directory tells a sweep that its writer lives, also between two renames."""
    run = root / "run"
    save_versions(run, [1])

    class Watched(NoExchange):
        def rename(self, source: str, target: str) -> None:
            super().rename(source, target)
            with Checkpointer(run, threads=1) as c:
                live = state(0)
                assert c.steps() == [1] and c.restore(live) == 1 and live["version"] in (1, 2)
                assert same(c.load(1), state(live["version"]))

    with Checkpointer(run, background=False, threads=1, store=Watched()) as c:
        c.save(1, state(2))
        live = state(0)
        assert c.restore(live) == 1 and live["version"] == 2
    assert [path.name for path in run.iterdir()] == ["step-00000001"]


def test_a_link_that_is_replaced_keeps_what_it_led_to(root: Path) -> None:
    for store in (LocalStore(), NoExchange()):
        save_versions(root / "elsewhere", [1])
        (root / "run").mkdir()
        (root / "run" / "step-00000001").symlink_to(root / "elsewhere" / "step-00000001")
        save_versions(root / "run", [1], store=store)
        assert not (root / "run" / "step-00000001").is_symlink()
        with Checkpointer(root / "elsewhere") as c:
            c.verify(1)
        assert len(list((root / "run").iterdir())) == 1
        shutil.rmtree(root / "run")
        shutil.rmtree(root / "elsewhere")


def test_threads_of_one_process_share_a_directory(root: Path) -> None:
    errors: list[BaseException] = []

    def work(first: int) -> None:
        try:
            save_versions(root / "run", list(range(first, 30, 3)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with Checkpointer(root / "run") as c:
        assert c.steps() == list(range(1, 30))


def test_removing_what_somebody_else_removes_is_no_error(root: Path) -> None:
    save_versions(root / "run", list(range(1, 30)))

    def remove_all() -> None:
        with Checkpointer(root / "run", threads=1) as c:
            for step in range(1, 30):
                c.remove(step)

    ended(forked(remove_all), forked(remove_all))
    assert list((root / "run").iterdir()) == []
