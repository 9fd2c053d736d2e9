"""`Checkpointer`: checkpoints for a plain training loop."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from milepost.engine.agreement import AgreedSearch, newest_good
from milepost.engine.commit import REPLACED, remove_checkpoint, sweep
from milepost.engine.directory import DirectoryEngine, DirectorySave
from milepost.engine.lazy import changed_by_steps
from milepost.engine.reader import StoredCheckpoint
from milepost.engine.report import RestoreReport
from milepost.engine.restore import collect, restore
from milepost.engine.retention import Entry, KeepBest, Mode, Retention, Rule
from milepost.engine.save import Committed
from milepost.engine.votes import Ranks
from milepost.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    MisconfigurationException,
)
from milepost.format.manifest import HEAD_NAME, metrics_as_numbers
from milepost.storage.store import Store

_NAME = re.compile(r"step-(\d{8,})")


class Checkpointer:
    """Saves the state of a training loop, and puts the newest good one back.

    ::

        with Checkpointer("runs/1") as checkpointer:
            state = {"model": model, "optimizer": optimizer, "rng": RandomState()}
            for step in range(checkpointer.restore(state) + 1, 10_001):
                train(step)
                if step % 100 == 0:
                    checkpointer.save(step, state, metrics={"loss": loss})

    A checkpoint is a directory ``step-00000100`` of plain safetensors files, indexes with digests and a manifest
    (docs/format.md). It is there whole or not at all, through any crash.

    Args:
        directory: where the checkpoints lie; made when the first is saved.
        background: whether `save` returns once the state is copied to host memory, and writes while training goes on.
            The copy takes as much memory as the state.
        lazy: in the background, copy what only the optimizers among the saved objects change after `save` has
            returned: their next step waits for it. Ask for it only where nothing but `optimizer.step()` changes
            parameters and the optimizers' state between a save and the next step.
        on_busy: what `save` does while the one before is still being written: ``"wait"`` for it, or ``"skip"``: return
            that one's handle and save nothing.
        keep: which checkpoints stay when a new one is committed; all, where it is None. Rules compose:
            ``KeepNewest(3) | KeepBest(2) | KeepEvery(1000)``. The one that was restored is not removed.
        monitor: the metric by which `KeepBest` ranks.
        mode: whether its smallest or its largest value is the best.
        threads: that copy, digest and write.
        store: what makes the calls to the file system; those of `milepost.testing` record them or make them fail.
        ranks: that save together: each of them makes the same calls with the same directory, writes what is its own,
            and is told the same outcome. ``"auto"``: those of torch's process group, if there is one of several. None:
            this one alone.
        rank_deadline_seconds: how long one of them may go without getting on, or be later than another, before the save
            is given up on all.

    Raises:
        MisconfigurationException: an argument that cannot work.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        background: bool = True,
        lazy: bool = False,
        on_busy: Literal["wait", "skip"] = "wait",
        keep: Rule | None = None,
        monitor: str | None = None,
        mode: Mode = "min",
        threads: int = 2,
        store: Store | None = None,
        ranks: Ranks | Literal["auto"] | None = "auto",
        rank_deadline_seconds: float = 60.0,
    ) -> None:
        if on_busy not in ("wait", "skip"):
            raise MisconfigurationException(f"on_busy={on_busy!r}: use 'wait' or 'skip'.")
        if lazy and not background:
            raise MisconfigurationException("lazy=True copies in the background: it needs background=True.")
        if threads < 1:
            raise MisconfigurationException(f"threads={threads!r}: give at least 1.")
        if mode not in ("min", "max"):
            raise MisconfigurationException(f"mode={mode!r}: use 'min' or 'max'.")
        if monitor is None and keep is not None and any(isinstance(rule, KeepBest) for rule in keep.parts()):
            raise MisconfigurationException("KeepBest ranks by a metric: name it with monitor=... .")
        self.directory = Path(directory)
        self._retention = None if keep is None else Retention(keep, mode)
        self._monitor = monitor
        self._restored: int | None = None
        self._known: dict[int, tuple[int, Entry]] = {}  # by step: inode of the directory, and what its head says
        self._background = background
        self._lazy = lazy
        self._on_busy = on_busy
        self._engine = DirectoryEngine(store, threads, ranks, rank_deadline_seconds)
        self._newest: DirectorySave | None = None
        self.report: RestoreReport | None = None
        """What the last `restore` took and what it left; None where it found no checkpoint."""

    # ---- saving ----------------------------------------------------------------------------------------------------

    def save(
        self, step: int, state: Mapping[str, Any], metrics: Mapping[str, float] | None = None, *, wait: bool = False
    ) -> DirectorySave:
        """Save `state` as the checkpoint of `step`; one of the same step is replaced.

        Args:
            step: 0 or more.
            state: by name what is to be saved: objects with `state_dict` and `load_state_dict`, tensors, plain values,
                and containers of these.
            metrics: numbers to be found again in listings.
            wait: return when it is durable, also in the background mode.

        Returns:
            A handle: ``done()`` tells whether it has ended, ``result()`` waits and raises what it failed with.

        Raises:
            CheckpointSaveError: writing failed; in the background mode also what the save before failed with, once.
            UnencodableValueError: a value cannot be stored as data. Nothing was written.
        """
        if step < 0:
            raise MisconfigurationException(f"step={step!r}: give 0 or more.")
        if self._on_busy == "skip" and self._is_busy(step) and self._newest is not None:
            return self._newest
        try:
            saved = self._engine.save(
                self.path(step),
                collect(state),
                step=step,
                metrics=metrics,
                background=self._background,
                lazy=changed_by_steps(state.values()) if self._lazy else None,
                then=None if self._retention is None else self._retain,
            )
        except Exception as error:
            self._newest = DirectorySave.failed_with(error, str(self.path(step).absolute()), step)
            raise
        self._newest = saved
        if wait:
            saved.result()
        return saved

    def _is_busy(self, step: int) -> bool:
        """Whether the save before is still being written. Of several ranks the first decides.

        The others ask, also where nothing of theirs is being written, such as after a save that failed on them alone:
        else some would save, and some skip.
        """
        ranks = self._engine.ranks
        busy = self._newest is not None and not self._newest.done()
        return busy if ranks is None else ranks.meeting(f"{self.path(step)} busy").decided(busy)

    def prepare(self, state: Mapping[str, Any]) -> int:
        """Have the host memory for saves of `state` in the background before the first one. Returns its bytes."""
        return self._engine.prepare(collect(state))

    def wait(self) -> None:
        """Wait until nothing is under way.

        Raises:
            CheckpointSaveError: a save in the background failed and nobody was told.
        """
        self._engine.wait()

    def close(self) -> None:
        """Wait, and give back memory and threads. Raises as `wait` does."""
        self._engine.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as second:
            if error is None:
                raise
            error.add_note(f"While the checkpointer was closed, a save failed: {second}")

    def _retain(self, committed: Committed) -> None:
        """Called in order, after each commit: remove what the rules do not keep."""
        assert self._retention is not None
        entries: list[Entry] = []
        for step in self._present():
            with suppress(FileNotFoundError):  # another process has removed it since, or is replacing it
                entries.append(self._entry(step))
        kept = {entry.step for entry in self._retention.retain(entries)} | {committed.head.step, self._restored}
        for entry in entries:
            if entry.step not in kept:
                remove_checkpoint(self._engine.store, entry.path)
                self._known.pop(entry.step, None)

    def _entry(self, step: int) -> Entry:
        """What retention needs to know, out of the head. A damaged one has no score, and is not read again.

        Raises:
            FileNotFoundError: it is not there any more.
        """
        path = self.path(step)
        inode = path.stat().st_ino
        if self._known.get(step, (0,))[0] != inode:
            score, time = None, path.stat().st_mtime
            try:
                with StoredCheckpoint(path.absolute()) as stored:
                    time = stored.head.time
                    score = metrics_as_numbers(stored.head.metrics).get(self._monitor or "")
            except (CheckpointCorruptError, CheckpointFormatError):
                pass
            self._known[step] = (inode, Entry(str(path.absolute()), score, step, time))
        return self._known[step][1]

    # ---- reading ---------------------------------------------------------------------------------------------------

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` lies, or would."""
        return self.directory / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """The steps of all committed checkpoints, in order. One that is being written is not among them."""
        sweep(self._engine.store, str(self.directory))
        return self._present()

    def _present(self) -> list[int]:
        while True:
            found, gone = [], False
            for entry in self.directory.iterdir() if self.directory.is_dir() else ():
                match = _NAME.fullmatch(entry.name.removeprefix(REPLACED))
                if match and (entry / HEAD_NAME).is_file():
                    found.append(int(match[1]))
                elif match:
                    gone = gone or not os.path.lexists(entry)
            if not gone:  # else somebody removes while we list, and may have saved what is not in the list
                return sorted(set(found))

    def restore(
        self,
        state: MutableMapping[str, Any],
        step: int | None = None,
        *,
        parts: Collection[str] | None = None,
        strict: bool = True,
    ) -> int:
        """Put the newest good checkpoint into `state`: into the tensors that are there.

        It may have been saved by any number of ranks, in any layout: each rank reads what it holds. Where several ranks
        save together, all of them call this, and all restore the same step: where one finds damage in what it reads,
        all go on to the next older checkpoint.

        Args:
            state: as it was given to `save`; plain values in it are replaced.
            step: only this one will do.
            parts: keys of `state` to restore, such as ``{"model"}``; the others stay as they are. None: all.
            strict: whether all of them must be in the checkpoint and fit. Else what is not, or does not, stays as it
                is: names that a module has more or fewer, tensors of another shape or type, the state of an optimizer
                over other parameters. `report` says what became of each.

        Returns:
            The step of the checkpoint; 0 where there is none, and nothing was touched.

        Raises:
            ResumeError: the newest checkpoint is sound and does not fit `state`. Nothing was touched.
            CheckpointCorruptError: there are checkpoints and all are damaged, or the one of `step` is. What was read
                before the damage was found has been overwritten in `state`.
            CheckpointNotFoundError: there is none of `step`.
            RankFailedError: of several ranks another one does not take part, or cannot restore what is sound.
        """
        self._engine.wait()
        self.report = None

        def one(candidate: int) -> str:
            return self._restore_one(state, candidate, parts, strict)

        ranks = self._engine.ranks
        if ranks is not None:
            return AgreedSearch(ranks, str(self.directory.absolute()), self.steps, self._engine.progress).run(one, step)
        if step is not None:
            one(step)
            return step
        return newest_good(one, self.steps)

    def load(self, step: int) -> dict[str, Any]:
        """The state of `step`, in new memory: what objects had returned from `state_dict` where objects were saved.

        Raises:
            CheckpointError: it is not there, or damaged.
        """
        self._check_there(step)
        return self._engine.load(self.path(step))

    def verify(self, step: int) -> None:
        """Read all of a checkpoint and compare it with its digests.

        Raises:
            CheckpointCorruptError: names the first damaged tensor and range of bytes.
        """
        self._check_there(step)
        self._engine.verify(self.path(step))

    def remove(self, step: int) -> None:
        """Remove a checkpoint; where there is none, nothing happens."""
        self._engine.remove(self.path(step))

    def _restore_one(
        self, state: MutableMapping[str, Any], step: int, parts: Collection[str] | None, strict: bool
    ) -> str:
        """Returns which commit it was."""
        self._check_there(step)
        self.report, commit = self._engine.reading(
            self.path(step), lambda stored: (restore(self._engine, stored, state, parts, strict), stored.commit)
        )
        with suppress(CheckpointError):  # it is removed or replaced meanwhile: then the next save writes all
            self._engine.adopt(self.path(step))
        self._restored = step
        return commit

    def _check_there(self, step: int) -> None:
        aside = self.directory / f"{REPLACED}{self.path(step).name}"  # while it is being replaced
        if not (self.path(step).is_dir() or aside.is_dir() or self.path(step).is_dir()):
            raise CheckpointNotFoundError(
                f"There is no checkpoint of step {step} in {self.directory}; there are: {self.steps()}."
            )
