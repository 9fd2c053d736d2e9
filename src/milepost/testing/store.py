"""What any Store must do, as tests. Derive from the class, say how yours is made, run pytest."""

from __future__ import annotations

import errno
import itertools
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from milepost.engine.checkpointer import Checkpointer
from milepost.engine.retention import KeepNewest
from milepost.errors import CheckpointSaveError
from milepost.storage.store import Store
from milepost.testing.crashes import crash_states
from milepost.testing.faulty_store import Fault, FaultyStore
from milepost.testing.recording import RecordingStore
from milepost.testing.store_calls import StoreCallTests, in_threads

_FORGIVEN = {"link", "remove_file", "remove_directory"}
"""Where a link cannot be made the file is written; what of a replaced checkpoint is left is swept later."""
_LEAVES_THE_OLD = "what was there before must be found"


class StoreTests(StoreCallTests):
    """Subclass it under a name that starts with ``Test`` and define `make_store`.

    A store that passes its calls on to another one defines `make_store_over` too: the faults and the crashes are then
    tried beneath it as well as above.
    """

    def make_store_over(self, inner: Store) -> Store | None:
        """Your store around `inner`, if yours decorates another one. None: it does not."""
        return None

    # ---- whole saves -------------------------------------------------------------------------------------------------

    def test_what_was_saved_is_restored(self, root: Path) -> None:
        with self._checkpointer(root) as c:
            assert c.restore(state(0)) == 0
            for step in (1, 2, 3):
                c.save(step, state(step))
        assert found(root) == (3, 3)

    def test_a_checkpoint_is_replaced(self, root: Path) -> None:
        with self._checkpointer(root) as c:
            for version in (1, 2, 3):
                c.save(1, state(version))
        assert found(root) == (1, 3)
        assert [path.name for path in (root / "run").iterdir()] == ["step-00000001"]

    def test_rules_remove_checkpoints(self, root: Path) -> None:
        with self._checkpointer(root, keep=KeepNewest(2)) as c:
            for step in range(1, 6):
                c.save(step, state(step))
        assert sorted(path.name for path in (root / "run").iterdir()) == ["step-00000004", "step-00000005"]
        assert found(root) == (5, 5)

    def test_what_is_unchanged_is_linked_or_written(self, root: Path) -> None:
        with self._checkpointer(root) as c:
            for step in (1, 2):
                c.save(step, state(7))
        assert found(root) == (2, 7)
        with Checkpointer(root / "run") as c:
            c.verify(1)

    def test_in_the_background_with_threads(self, root: Path) -> None:
        big = torch.arange(3_000_001, dtype=torch.float32)
        with Checkpointer(root / "run", store=self.make_store(), threads=4) as c:
            for step in (1, 2, 3):
                c.save(step, {**state(step), "big": big + step})
        live = {**state(-1), "big": torch.zeros_like(big)}
        with Checkpointer(root / "run") as c:
            assert c.restore(live) == 3
        assert torch.equal(live["big"], big + 3)

    def test_two_savers_on_one_directory(self, root: Path) -> None:
        store = self.make_store()

        def work(first: int) -> None:
            with self._checkpointer(root, store=store) as c:
                for step in range(first, 6, 2):
                    c.save(step, state(step))
                    c.save(9, state(9))

        in_threads([lambda: work(1), lambda: work(2)])
        assert found(root) == (9, 9)
        assert len(list((root / "run").iterdir())) == 6

    # ---- faults ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("side", ["above", "beneath"])
    def test_an_error_of_each_call_is_told_of_once(self, root: Path, side: str) -> None:
        """Above: the store is asked for what may come after an error. Beneath: it hands errors on."""
        self._checkpointed(root, self.make_store(), (1, 1), (2, 2))
        version, failed = 2, set()
        for at in itertools.count():
            faulty, store = self._faulty(at, side)
            with self._checkpointer(root, store=store) as c:
                assert c.restore(live := state(0)) == 2 and live["version"] == version
                told = told_of(lambda: c.save(2, state(at + 10)), c.wait, c.wait)  # noqa: B023  # called at once
                if faulty.failed is None:
                    assert not told
                    break
                failed.add(faulty.failed[0])
                forgiven = faulty.failed[0] in _FORGIVEN
                assert len(told) == (0 if forgiven else 1), f"{len(told)} errors for one of {faulty.failed}"
                expected = at + 10 if forgiven else version
                assert found(root) == (2, expected), f"{_LEAVES_THE_OLD} after a failed {faulty.failed}"
                version = at + 1000
                c.save(2, state(version))  # the same store goes on working
        assert failed >= {"make_directory", "create", "write", "finish", "sync_directory"}
        assert sorted(path.name for path in (root / "run").iterdir()) == ["step-00000001", "step-00000002"]

    def _faulty(self, at: int, side: str) -> tuple[FaultyStore, Store]:
        number = (errno.ENOSPC, errno.EIO, errno.EROFS)[at % 3]
        fault = Fault(at, number, short=at % 2 == 0)
        if side == "above":
            faulty = FaultyStore(fault, self.make_store())
            return faulty, faulty
        faulty = FaultyStore(fault)
        store = self.make_store_over(faulty)
        if store is None:
            pytest.skip("the store decorates no other")
        return faulty, store

    # ---- crashes -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("side", ["above", "beneath"])
    def test_every_crash_leaves_the_old_or_the_new_one(self, root: Path, side: str) -> None:
        """A sample of what a crash may leave of a save, a replacement and a removal. Beneath: of what it asks."""
        (root / "recorded").mkdir()
        recording, store = self._recording(root / "recorded", side)
        with self._checkpointer(root / "recorded", store=store, keep=KeepNewest(1)) as c:
            for step, version in ((1, 1), (2, 2), (2, 3)):
                c.save(step, state(version))
                recording.mark(str(version))
        states = list(crash_states(recording, reorderings=1, samples=2, seed=1))
        for crashed in random.Random(2).sample(states, min(len(states), 12)):
            crashed.write_to(root / "crashed")
            newest = int(crashed.marks[-1]) if crashed.marks else 0
            version = found(root / "crashed")[1]
            assert version in (newest, newest + 1), f"version {version} of {newest} and the next, {crashed}"
            self._checkpointed(root / "crashed", self.make_store(), (9, 9))
            assert found(root / "crashed") == (9, 9), crashed
            left = [path.name for path in (root / "crashed" / "run").iterdir() if path.name.startswith(".")]
            assert not left, f"{left} is left over, {crashed}"
            shutil.rmtree(root / "crashed")

    def _recording(self, root: Path, side: str) -> tuple[RecordingStore, Store]:
        if side == "above":
            recording = RecordingStore(root, self.make_store())
            return recording, recording
        recording = RecordingStore(root)
        store = self.make_store_over(recording)
        if store is None:
            pytest.skip("the store decorates no other")
        return recording, store

    def _checkpointer(self, root: Path, store: Store | None = None, keep: Any = None) -> Checkpointer:
        return Checkpointer(root / "run", background=False, threads=1, store=store or self.make_store(), keep=keep)

    def _checkpointed(self, root: Path, store: Store, *steps: tuple[int, int]) -> None:
        with self._checkpointer(root, store=store) as c:
            for step, version in steps:
                c.save(step, state(version))


def told_of(*asked: Callable[[], Any]) -> list[CheckpointSaveError]:
    """The errors that a caller sees who asks for one thing after the other."""
    told = []
    for ask in asked:
        try:
            ask()
        except CheckpointSaveError as error:
            assert isinstance(error.__cause__, OSError), f"{error.__cause__!r} instead of the system's error"
            told.append(error)
    return told


def state(version: int) -> dict[str, Any]:
    """A state in which every byte of some tensors tells the version, and others never change."""
    return {
        "model": {"frozen": torch.arange(3000.0), "trained": torch.full((500,), float(version))},
        "optimizer": [torch.full((100,), float(version)), {"step": version}],
        "version": version,
    }


def found(root: Path) -> tuple[int, int]:
    """Step and version that a new process would go on from. All that is there is sound."""
    live = state(-1)
    with warnings.catch_warnings(), Checkpointer(root / "run", threads=1) as c:
        warnings.simplefilter("error")  # "passing over the damaged checkpoint": there must be none
        step = c.restore(live)
        for other in c.steps():
            c.verify(other)
    if not step:
        return 0, 0
    expected = state(live["version"])
    assert torch.equal(live["model"]["frozen"], expected["model"]["frozen"]), "torn"
    assert torch.equal(live["model"]["trained"], expected["model"]["trained"]), "torn"
    assert torch.equal(live["optimizer"][0], expected["optimizer"][0]), "torn"
    return step, int(live["version"])
