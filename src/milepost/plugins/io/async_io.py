"""Saving in the background: a snapshot on the caller's thread, the rest on others, in order for each path."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

from milepost.engine.lazy import StepGate, changed_by_steps
from milepost.engine.snapshot import snapshot
from milepost.engine.staging import Arena
from milepost.errors import CheckpointSaveError, MisconfigurationException
from milepost.plugins.io import checkpoint_io as io_calls
from milepost.plugins.io.checkpoint_io import CheckpointIO
from milepost.plugins.io.snapshot_io import SnapshotCheckpointIO
from milepost.plugins.io.torch_io import TorchCheckpointIO

_THREADS = 2  # that copy, the caller's included


class AsyncSave:
    """Handle of a save, or of a removal behind it, in the background."""

    def __init__(self, path: str, step: int | None, *, removes: bool = False) -> None:
        self.path = path
        self.step = step
        self._removes = removes
        self._key = _key(path)
        self._future: Future[Any] = Future()
        self._reported = False
        self._lock = threading.Lock()

    def done(self) -> bool:
        return self._future.done()

    @property
    def failed(self) -> bool:
        """Whether it has ended badly, whoever was told of it."""
        return self.done() and self._future.exception() is not None

    def result(self, timeout: float | None = None) -> None:
        """Wait until the checkpoint is durable; raise what the save failed with, once."""
        self._future.exception(timeout)
        if (error := self._take_error()) is not None:
            raise error

    def _failed(self) -> bool:
        return self.failed and not self._reported

    def _take_error(self) -> CheckpointSaveError | None:
        """What it failed with, to whoever asks first."""
        with self._lock:
            if not self._failed():
                return None
            self._reported = True
        error = self._future.exception()
        if isinstance(error, CheckpointSaveError):
            return error
        what = "Removing the checkpoint at" if self._removes else f"Saving the checkpoint of step {self.step} to"
        made = CheckpointSaveError(
            f"{what} {self.path!r} in the background failed: {type(error).__name__}: {error}",
            path=self.path,
            step=self.step,
        )
        made.__cause__ = error
        return made


class AsyncCheckpointIO(CheckpointIO):
    """Wraps another CheckpointIO and removes the wait from its saves.

    `save_checkpoint` copies the state (tensors into host memory that is kept and used again, arrays and containers too,
    tied tensors tied) and returns a handle. A `SnapshotCheckpointIO`, which does that itself, is left to it. A plugin
    that keeps the tensors it was given keeps that memory with them; the next save then gets other.

    Saves of one path keep their order. A load, or another question about a path, waits for what is under way for that
    path only. A removal happens once all saves asked for before it have ended, and only if none of them failed: what
    was to be replaced stays until its replacement is there.

    A failed save raises once: from its handle, or at the next save, at the load of its path, at `wait` or at
    `teardown`, whichever comes first. Where several failed, the first is raised, with the others in its ``others``.

    Args:
        checkpoint_io: what writes; a `TorchCheckpointIO` by default. Its methods may be called for different paths at
            once, in up to ``max_pending + 1`` threads.
        max_pending: saves under way at most; one more waits for a place before it copies. Memory is bounded by this
            many snapshots. A `SnapshotCheckpointIO` has place for one.
        lazy: as for `SnapshotCheckpointIO`: copy parameters and the optimizers' state after `save_checkpoint` has
            returned; the next optimizer step waits for it.

    Raises:
        MisconfigurationException: `checkpoint_io` lacks a method of a CheckpointIO, or `max_pending` is below 1.
    """

    def __init__(self, checkpoint_io: Any = None, max_pending: int = 1, *, lazy: bool = False) -> None:
        if max_pending < 1:
            raise MisconfigurationException(f"max_pending={max_pending} must be at least 1.")
        self.checkpoint_io = TorchCheckpointIO() if checkpoint_io is None else checkpoint_io
        self._max_pending = max_pending
        self._begun: list[AsyncSave] = []  # in the order they were asked for, until they have ended and been reported
        self._lazy = lazy
        self._gate = StepGate()
        self._arenas: list[Arena] = []  # those that no save is using
        self._workers: ThreadPoolExecutor | None = None
        self._copiers: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    @property
    def checkpoint_io(self) -> Any:
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, inner: Any) -> None:
        if not io_calls.is_checkpoint_io(inner):
            raise MisconfigurationException(
                f"AsyncCheckpointIO({inner!r}): it needs save_checkpoint, load_checkpoint and remove_checkpoint."
            )
        self._checkpoint_io = inner

    # ---- in the background -----------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: Any,
        storage_options: Any = None,
        *,
        optimizers: Sequence[Any] = (),
    ) -> AsyncSave:
        """Take a snapshot and write it in the background.

        Args:
            optimizers: with ``lazy=True``, those whose parameters and state nothing changes but their ``step``, until
                `staged` is called.

        Raises:
            CheckpointSaveError: an earlier save failed and has not been reported yet; this one is then not begun.
        """
        self._report_ended()
        itself = isinstance(self.checkpoint_io, SnapshotCheckpointIO)
        while len(under_way := self._under_way(saves=True)) >= (1 if itself else self._max_pending):
            wait_for([save._future for save in under_way], return_when=FIRST_COMPLETED)
            self._report_ended()
        step = checkpoint.get("global_step") if isinstance(checkpoint, dict) else None
        save = AsyncSave(str(path), step)
        before = self._under_way(save._key)
        if itself:
            _wait_for(before)  # removals of the path
            pending = io_calls.save(self.checkpoint_io, checkpoint, path, storage_options, optimizers)
            return self._begin(save, pending.result)
        arena = self._arenas.pop() if self._arenas else Arena()
        lazy = changed_by_steps(optimizers) if self._lazy else None
        frozen, copying = snapshot(checkpoint, arena, self._threads(), _THREADS, lazy)
        if copying is not None:
            self._gate.hold_until(copying)
        given = [frozen]  # taken out where it is written, so that it is gone when that has ended

        def work() -> None:
            try:
                _wait_for(before)
                if copying is not None:
                    copying.result()
                io_calls.save(self.checkpoint_io, given.pop(), path, storage_options).result()
            finally:
                given.clear()
                self._arenas.append(arena)

        return self._begin(save, work)

    def staged(self) -> None:
        """Wait until what is being saved is copied, and its tensors may be changed by anybody."""
        self._gate.wait()
        io_calls.staged(self.checkpoint_io)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove it, in the background where a save is under way."""
        before = list(self._begun)
        running = [save for save in before if not save.done()]
        if any(save._failed() for save in before if save not in running):
            return  # nobody knows of that failure yet, and what was to be replaced stays
        if not running:
            io_calls.remove(self.checkpoint_io, path)
            return

        def work() -> None:
            _wait_for(running)
            if not any(save.failed for save in running):  # also where its handle has told of it by now
                io_calls.remove(self.checkpoint_io, path)

        self._begin(AsyncSave(str(path), None, removes=True), work)

    def _begin(self, save: AsyncSave, work: Callable[[], None]) -> AsyncSave:
        if self._workers is None:
            # Begun in the order of asking, so what a task waits for always has a thread. One more for removals.
            self._workers = ThreadPoolExecutor(self._max_pending + 1, thread_name_prefix="milepost-save")
        with self._lock:
            self._begun.append(save)
        self._workers.submit(_run, work, save._future)
        return save

    # ---- right here, once what is under way for the path has ended ------------------------------------------------

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load what was last asked to be saved there.

        Raises:
            CheckpointSaveError: that save failed, and this has not been reported yet.
        """
        self._settle(path)
        self._report(save for save in self._begun if save._key == _key(path))
        return io_calls.load(self.checkpoint_io, path, map_location=map_location, weights_only=weights_only)

    def exists(self, path: Any) -> bool | None:
        self._settle(path)
        return io_calls.exists(self.checkpoint_io, path)

    def list(self, directory: Any) -> Any:
        """Paths, or None where the inner plugin does not list: an empty list would hide what is there."""
        _wait_for(self._under_way())
        return io_calls.list_checkpoints(self.checkpoint_io, directory)

    def verify(self, path: Any) -> str | None:
        self._settle(path)
        return io_calls.verify(self.checkpoint_io, path)

    def link(self, source: Any, target: Any) -> bool:
        self._settle(source)
        self._settle(target)
        return bool(io_calls.link(self.checkpoint_io, source, target))

    def probe(self, directory: Any) -> int | None:
        return io_calls.probe(self.checkpoint_io, directory)

    def check(self, checkpoint: dict[str, Any]) -> None:
        io_calls.check(self.checkpoint_io, checkpoint)

    def wait(self) -> None:
        """Wait for all that is under way. Raises failures that have not been reported; none is raised twice."""
        _wait_for(self._under_way())
        try:
            self._report_ended()
        finally:
            io_calls.wait(self.checkpoint_io)

    def teardown(self) -> None:
        """Finish, stop the threads and tear the inner plugin down, whatever fails. Another run may follow."""
        try:
            self.wait()
        finally:
            self._gate.release()
            pools = [pool for pool in (self._workers, self._copiers) if pool is not None]
            self._workers = self._copiers = None
            for pool in pools:
                pool.shutdown(wait=True)
            self._arenas.clear()
            io_calls.teardown(self.checkpoint_io)

    def _threads(self) -> ThreadPoolExecutor:
        if self._copiers is None:
            self._copiers = ThreadPoolExecutor(_THREADS, thread_name_prefix="milepost-copy")
        return self._copiers

    def _settle(self, path: Any) -> None:
        _wait_for(self._under_way(_key(path)))

    def _under_way(self, key: str | None = None, *, saves: bool = False) -> Any:
        """What has not ended: of one path or all, saves only or removals too."""
        return [
            save
            for save in tuple(self._begun)
            if not save.done() and key in (None, save._key) and not (saves and save._removes)
        ]

    def _report_ended(self) -> None:
        with self._lock:
            ended = [save for save in self._begun if save.done()]
            self._begun = [save for save in self._begun if save not in ended]
        self._report(ended)

    def _report(self, ended: Iterable[AsyncSave]) -> None:
        errors = [error for save in ended if (error := save._take_error()) is not None]
        if errors:
            first, *others = errors
            first.others = tuple(others)
            for other in others:
                first.add_note(f"Failed as well: {other}")
            raise first


def _run(work: Callable[[], None], future: Future[Any]) -> None:
    try:
        work()
    except BaseException as error:  # whatever it is, the caller's thread is to see it
        cause: BaseException | None = error
        while cause is not None:  # frames of the save would keep the whole snapshot alive until somebody asks
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        future.set_exception(error)
    else:
        future.set_result(None)


def _wait_for(saves: Iterable[AsyncSave]) -> None:
    wait_for([save._future for save in saves])


def _key(path: Any) -> str:
    """One key for each place: local paths however they are spelt. A link there is replaced, not followed."""
    place = Path(name := str(path))
    return name if "://" in name else str(place.parent.resolve() / place.name)
