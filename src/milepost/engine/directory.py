"""The engine for checkpoint directories: saves in the background or at once, loads, verifies, removes, in order."""

from __future__ import annotations

import errno
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import torch

from milepost import _distributed
from milepost.engine.batch import Staging
from milepost.engine.collector import collector_paused
from milepost.engine.commit import PendingDirectory, identity, make_parents, remove_checkpoint, sweep
from milepost.engine.lazy import StepGate, WrittenMeanwhile, rows_that_can_wait
from milepost.engine.loading import Empty, owned_tree, read_tensors
from milepost.engine.locating import Located, Ref
from milepost.engine.plan_memory import PlanMemory
from milepost.engine.planner import Earlier
from milepost.engine.rank_blobs import RankPlanMemory
from milepost.engine.rank_save import RankSaving
from milepost.engine.reader import READ_ATTEMPTS, StoredCheckpoint
from milepost.engine.requests import BlobPlan, Image
from milepost.engine.save import Committed, Saving
from milepost.engine.spill import Spill
from milepost.engine.staging import Arena, LiveImage, Source
from milepost.engine.state import Flattened, rebuild, references
from milepost.engine.votes import Meeting, RankFailure, Ranks
from milepost.engine.writer import Workers
from milepost.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointRemoveError,
    CheckpointSaveError,
)
from milepost.storage.store import LocalStore, Store

_T = TypeVar("_T")
_Write = Callable[[Sequence[Image]], Committed]


class DirectorySave:
    """A save under way, or done."""

    def __init__(self, path: str, step: int) -> None:
        self.path = path
        self.step = step
        self.staging: Staging | None = None
        self.meeting: Meeting | None = None
        self._future: Future[Committed] = Future()
        self._told = False

    @classmethod
    def failed_with(cls, error: Exception, path: str, step: int) -> DirectorySave:
        """One that was never under way on this rank."""
        made = cls(path, step)
        made._future.set_exception(error)
        return made

    def staged(self, timeout: float | None = None) -> None:
        """Wait until everything is copied: from then on all tensors may be changed by anybody.

        Raises:
            TimeoutError: that has not ended within `timeout` seconds.
        """
        if self.staging is not None:
            self.staging.exception(timeout)

    def refuse(self, error: BaseException) -> None:
        """Tell the other ranks of an error that they cannot know of, if there are any."""
        if self.meeting is not None:
            self.meeting.refuse(error)

    def done(self) -> bool:
        """Whether it has ended, well or badly. Never blocks."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> None:
        """Wait until the checkpoint is durable; raise what the save failed with, once.

        Raises:
            CheckpointSaveError: it did not become durable.
            TimeoutError: it has not ended within `timeout` seconds.
        """
        error = self._future.exception(timeout)
        if error is not None and not self._told:
            self._told = True
            raise error

    @property
    def failed(self) -> bool:
        """Whether it has ended badly and nobody was told."""
        return self._future.done() and self._future.exception() is not None and not self._told


class DirectoryEngine:
    """Stores states, nested mappings of tensors and plain values, as directories. One at a time is written.

    Args:
        store: the file system; another one is for tests.
        threads: that copy, digest and write. Two saturate a disk of a few GB/s.
        ranks: that save together: each of them makes the same calls, and writes what is its own. ``"auto"``: those of
            torch's process group, if there is one of several when a save begins. None: this one alone.
        rank_deadline_seconds: for ``"auto"``, how long one of them may go without getting on, or be late.
    """

    def __init__(
        self,
        store: Store | None = None,
        threads: int = 2,
        ranks: Ranks | Literal["auto"] | None = None,
        rank_deadline_seconds: float = 60.0,
    ) -> None:
        self.store = store or LocalStore()
        self._threads = threads
        self._workers: Workers | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._arena = Arena()
        self._plans = PlanMemory()
        self._ranks = ranks
        self._rank_deadline_seconds = rank_deadline_seconds
        self._rank_plans = RankPlanMemory()
        self._reading: StoredCheckpoint | None = None
        self._gate = StepGate()
        self._last: Committed | None = None
        self._under_way: list[DirectorySave] = []
        self._lock = threading.Lock()
        self._durable: set[str] = set()  # parents that were made, or found, and made durable

    # ---- saving ----------------------------------------------------------------------------------------------------

    @property
    def ranks(self) -> Ranks | None:
        """Those that save together now; None: this one saves alone."""
        return Ranks.of_process_group(self._rank_deadline_seconds) if self._ranks == "auto" else self._ranks

    def save(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, Any],
        *,
        step: int = 0,
        metrics: Mapping[str, float] | None = None,
        background: bool = True,
        lazy: Mapping[int, int] | None = None,
        pickled: Callable[[str, Any], None] | None = None,
        then: Callable[[Committed], None] | None = None,
    ) -> DirectorySave:
        """Save `state` at `path`, replacing what is there in one step.

        In the background: returns once the state is copied to the host memory kept for this, so that it may change; a
        save that is still being written is waited for first. Not in the background: returns when it is durable, and
        takes no memory but a buffer for each thread.

        Args:
            lazy: in the background, the tensors that only steps of optimizers change (`changed_by_steps`): they are
                copied after this returns, and the next step waits.
            pickled: as for `Flattened`.
            then: called after the commit, before the next save is begun, such as for retention. What it raises counts
                as an error of this save; where several ranks save, only rank 0 calls it, and an error is a warning.

        Raises:
            CheckpointSaveError: of an earlier save in the background that nobody was told of; or of this one.
            UnencodableValueError: a value in `state` cannot be stored as data.
        """
        target = os.path.abspath(path)  # noqa: PTH100  # not resolved: a link at the target is replaced, not followed
        save = DirectorySave(target, step)
        if (ranks := self.ranks) is not None:
            save.meeting = ranks.meeting(f"{target} {step}")
        try:
            self._save(save, state, dict(metrics or {}), background, lazy or {}, pickled, then)
        except BaseException as error:
            save.refuse(error)
            raise
        return save

    def _save(
        self,
        save: DirectorySave,
        state: Mapping[str, Any],
        metrics: dict[str, float],
        background: bool,
        lazy: Mapping[int, int],
        pickled: Callable[[str, Any], None] | None,
        then: Callable[[Committed], None] | None,
    ) -> None:
        self.raise_failed()
        with collector_paused():
            plans, write = self._planned(save, Flattened(state, pickled, ranks=save.meeting is not None), metrics)
        if not background:
            self._drain()
            self._run(save, write, [LiveImage(Source(plan)) for plan in plans], then)
            save.result()
            return
        self._drain()  # the arena holds the snapshot that is being written
        self.raise_failed()
        workers = self._started()
        later = [rows_that_can_wait(plan, lazy) for plan in plans] if lazy else []
        staged, copying = self._arena.stage(plans, workers.pool, workers.count, later)
        if copying is not None:
            self._gate.hold_until(copying)
            save.staging = copying
        self._under_way.append(save)
        assert self._writer is not None
        self._writer.submit(self._run, save, write, [*staged], then)

    def check(self, state: Mapping[str, Any]) -> None:
        """Find what a save could only pickle; nothing is written. Raises UnencodableValueError with the key path."""
        Flattened(state, ranks=self.ranks is not None)

    def prepare(self, state: Mapping[str, Any]) -> int:
        """Have the host memory that a save of `state` in the background needs. Returns its size in bytes.

        Without it the first save gets that memory, which takes longer than the copy.
        """
        self._drain()
        ranks = self.ranks
        flattened = Flattened(state, ranks=ranks is not None)
        if ranks is None:
            self._arena.reserve(self._plans.plans(flattened))
        else:
            self._arena.reserve(self._rank_plans.plan(flattened, ranks.rank, ranks.world_size).bound(flattened))
        self._arena.touch()
        return self._arena.size

    def _planned(
        self, save: DirectorySave, flattened: Flattened, metrics: dict[str, float]
    ) -> tuple[list[BlobPlan], _Write]:
        """The blobs that this rank writes, and what writes them and commits."""
        meeting = save.meeting
        if meeting is None:
            plans = self._plans.plans(flattened)

            def alone(images: Sequence[Image]) -> Committed:
                self._make_ready(os.path.dirname(save.path))  # noqa: PTH120
                saving = Saving(self.store, self._started(), plans, images, self._last)
                return saving.run(flattened, save.path, save.step, metrics)

            return plans, alone
        blobs = self._rank_plans.plan(flattened, meeting.ranks.rank, meeting.ranks.world_size)
        plans = blobs.bound(flattened)

        def together(images: Sequence[Image]) -> Committed:
            saving = RankSaving(self.store, self._started(), flattened, blobs, plans, images, self._last, meeting)
            return saving.run(save.path, save.step, metrics)

        return plans, together

    def _make_ready(self, parent: str) -> None:
        if parent not in self._durable or not os.path.isdir(parent):  # noqa: PTH112
            make_parents(self.store, parent)
            self._durable.add(parent)
        sweep(self.store, parent)

    def _run(
        self,
        save: DirectorySave,
        write: _Write,
        images: Sequence[Image],
        then: Callable[[Committed], None] | None,
    ) -> None:
        committed: Committed | None = None
        try:
            if save.staging is not None:
                save.staging.result()
            committed = self._last = write(images)
            if then is not None:
                _follow(save, then, committed)
        except BaseException as error:
            save.refuse(error)
            save._future.set_exception(_as_save_error(error, save, committed is not None))
        else:
            save._future.set_result(committed)

    def staged(self) -> None:
        """Wait until everything is copied: from then on all tensors may be changed by anybody."""
        self._gate.wait()

    def raise_failed(self) -> None:
        """Raise what a save in the background failed with, once."""
        for save in [s for s in self._under_way if s.done()]:
            self._under_way.remove(save)
            save.result()

    def wait(self) -> None:
        """Wait until nothing is under way; raise what failed."""
        self._drain()
        self.raise_failed()

    def close(self) -> None:
        """Wait, give back threads and memory, raise what failed. The engine can be used again."""
        self._drain()
        if self._writer is not None:
            self._writer.shutdown(wait=True)
        if self._workers is not None:
            self._workers.close()
        self._writer = self._workers = None
        self._arena = Arena()
        self.raise_failed()

    def _drain(self) -> None:
        for save in self._under_way:
            save._future.exception()
        self._gate.release()

    def _started(self) -> Workers:
        with self._lock:
            if self._workers is None:
                self._workers = Workers(self._threads)
                self._writer = ThreadPoolExecutor(1, thread_name_prefix="milepost-save")
            return self._workers

    # ---- reading ---------------------------------------------------------------------------------------------------

    def open(self, path: str | os.PathLike[str]) -> StoredCheckpoint:
        """Open a committed checkpoint. A save of that path that is under way is waited for."""
        target = os.path.abspath(path)  # noqa: PTH100
        for save in self._under_way:
            if save.path == target:
                save._future.exception()
        return StoredCheckpoint(target)

    def reading(self, path: str | os.PathLike[str], read: Callable[[StoredCheckpoint], _T]) -> _T:
        """Open a checkpoint and call `read` with it; where it is replaced meanwhile, again with the new one.

        Raises:
            CheckpointNotFoundError: it is not there, or was removed while it was read.
        """
        for left in reversed(range(READ_ATTEMPTS)):
            with self.open(path) as stored:
                try:
                    return read(stored)
                except (CheckpointCorruptError, CheckpointFormatError):
                    if left == 0 or stored.is_current():
                        raise
        raise AssertionError("the last attempt returns or raises")

    def progress(self) -> int:
        """A number that goes up while this gets on: with the bytes read while tensors are read, else with the time.

        What comes after reading may be an object's own `load_state_dict`, of whose progress nobody knows.
        """
        stored = self._reading
        return time.monotonic_ns() if stored is None else stored.bytes_read

    def load(
        self, path: str | os.PathLike[str], *, unpickle: bool = False, spill: Path | None = None
    ) -> dict[str, Any]:
        """Read a whole checkpoint, every byte of it verified.

        Args:
            unpickle: whether to load pickled values, which runs code of the file.
            spill: a directory on a disk with room for the tensors: they are put into a file there that has no name,
                and take memory only as long as there is some. None: into memory.

        Raises:
            CheckpointError: nothing is there, it is damaged, or it holds a pickled value and `unpickle` is False.
        """

        def read(stored: StoredCheckpoint) -> dict[str, Any]:
            tree = owned_tree(stored)
            wanted = references(tree)
            room = spill and Spill(spill, sum(blob.bytes for blob in stored.head.blobs), 2 * len(wanted))
            tensors = self.read_tensors(stored, wanted, empty=room.empty if room else None)
            state: dict[str, Any] = rebuild(tree, tensors.__getitem__, unpickle)
            return state

        with collector_paused():
            return self.reading(path, read)

    def read_tensors(
        self,
        stored: StoredCheckpoint,
        wanted: Iterable[Ref],
        into: Mapping[Ref, Sequence[torch.Tensor]] | None = None,
        located: Located | None = None,
        empty: Empty | None = None,
    ) -> dict[Ref, torch.Tensor]:
        """Read tensors, each into those given for it, or into new memory.

        Args:
            into: tensors of the stored type and shape; of a DTensor the part is read that this rank holds.
            located: what was found out about the checkpoint before.
            empty: makes the others, in C order; None: in new memory.

        Returns:
            For each the first one given for it, or the new one.
        """
        located = located or Located(stored, _distributed.rank())
        self._reading = stored
        try:
            return read_tensors(stored, located, self._started(), wanted, into or {}, empty)
        finally:
            self._reading = None

    def verify(self, path: str | os.PathLike[str]) -> None:
        """Read all of a checkpoint and compare it with its digests.

        Raises:
            CheckpointCorruptError: names the first damaged tensor and range of bytes.
            CheckpointError: it is not there, or no checkpoint.
        """
        self.reading(path, lambda stored: stored.verify(self._started()))

    def remove(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, after every save asked for before. Where there is none, nothing happens.

        Raises:
            CheckpointRemoveError: it is still there, and whole; or it is none any more, and some of its files are left.
        """
        self._drain()
        target = os.path.abspath(path)  # noqa: PTH100
        try:
            remove_checkpoint(self.store, target)
        except OSError as error:
            left = (
                "It is still there. Give yourself the right to write in its directory, and remove it again."
                if os.path.lexists(target)
                else "It is no checkpoint any more; the next save beside it removes what is left of it."
            )
            raise CheckpointRemoveError(
                f"Removing the checkpoint {target!r} failed: {type(error).__name__}: {error}. {left}", path=target
            ) from error

    def link(self, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> bool:
        """Give a checkpoint a second name: a directory of links. False where links cannot be made.

        What is at `target` is replaced in one step.
        """
        self._drain()
        origin, goal = os.path.abspath(source), os.path.abspath(target)  # noqa: PTH100
        make_parents(self.store, os.path.dirname(goal))  # noqa: PTH120
        with StoredCheckpoint(origin) as stored:
            identities = stored.identities()
        pending = PendingDirectory(self.store, goal)
        try:
            for name, known in identities.items():
                self.store.link(f"{origin}/{name}", pending.file(name))
                if identity(pending.file(name)) != known:
                    raise OSError(errno.ESTALE, "the checkpoint was replaced meanwhile", origin)
            pending.commit()
        except OSError:
            pending.abandon()
            return False
        return True

    def adopt(self, path: str | os.PathLike[str]) -> None:
        """Let the next save use again what is unchanged since the checkpoint at `path`, and this rank has written."""
        ranks = self.ranks
        rank = msgspec.UNSET if ranks is None else ranks.rank
        with self.open(path) as stored:
            if ranks is not None and stored.head.world_size != ranks.world_size:
                return
            blobs = tuple(
                Earlier(f"{stored.path}/{blob.name}", blob, stored.index(number))
                for number, blob in enumerate(stored.head.blobs)
                if blob.rank == rank
            )
            self._last = Committed(stored.path, stored.head, blobs, stored.identities())


def _follow(save: DirectorySave, then: Callable[[Committed], None], committed: Committed) -> None:
    """What comes after the commit. Of several ranks the first does it, and all have the same outcome without it."""
    if save.meeting is None:
        then(committed)
    elif save.meeting.ranks.rank == 0:
        try:
            then(committed)
        except Exception as error:
            warnings.warn(f"{_after_commit(error, save)} The next save tries it again.", stacklevel=2)


def _after_commit(error: Exception, save: DirectorySave) -> str:
    return (
        f"The checkpoint of step {save.step} is committed at {save.path!r}, but what follows a save, such as removing"
        f" older ones, failed: {type(error).__name__}: {error}."
    )


def _as_save_error(error: BaseException, save: DirectorySave, committed: bool) -> BaseException:
    if isinstance(error, CheckpointError) or not isinstance(error, Exception):
        return error
    if committed:
        made = CheckpointSaveError(_after_commit(error, save), path=save.path, step=save.step)
        made.__cause__ = error
        return made
    rank = None if save.meeting is None else save.meeting.ranks.rank
    cause = f"{type(error).__name__}: {error}"
    if isinstance(error, RankFailure):
        rank, cause = error.rank, error.cause
    where = "" if rank is None else f" on rank {rank}"
    remedy = "; free space or fix the permissions of the directory, or give another one"
    made = CheckpointSaveError(
        f"Saving the checkpoint of step {save.step} to {save.path!r} failed{where}: {cause}. What was there before is"
        f" intact{'' if isinstance(error, WrittenMeanwhile) else remedy}.",
        path=save.path,
        step=save.step,
        rank=rank,
    )
    made.__cause__ = error
    return made
