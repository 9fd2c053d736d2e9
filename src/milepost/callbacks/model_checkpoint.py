"""Saves checkpoints while a model trains, and keeps the best and the last."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch

from milepost.callbacks._arguments import check_last, resolve_retention
from milepost.callbacks._cataloged import CatalogedCheckpoint
from milepost.callbacks._followers import Followers
from milepost.callbacks._ledger import Save
from milepost.callbacks._monitor import Monitor
from milepost.callbacks._naming import absolute, default_dirpath
from milepost.callbacks._saver import Link, OnSaveError, Saver, describe
from milepost.callbacks._schedule import Done, Trigger, idle, saves_at_train_epoch_end
from milepost.callbacks._space import preflight
from milepost.engine.retention import Change, Retention, Rule

if TYPE_CHECKING:
    from milepost.trainer.module import Module
    from milepost.trainer.trainer import Trainer


class ModelCheckpoint(CatalogedCheckpoint):
    """Saves the run's state by a trigger, keeps the `save_top_k` best by `monitor` and, with `save_last`, the newest.

    A step or time trigger always refreshes the last; whether the state is among the best is decided only with a value
    of `monitor` that was logged at this very step, else at the end of the next validation or epoch. What the attributes
    say changes when a save is committed, not when it is asked for.

    Args:
        dirpath: where to save; None: ``checkpoints`` under the logger's directory or ``default_root_dir``.
        filename: template such as ``"{epoch:02d}-{val_loss:.2f}"``; None: ``"{epoch}-{step}"``.
        monitor: a logged metric, or None to rank by recency.
        verbose: print a line for each save.
        save_last: keep the newest state as ``last.ckpt``; ``"link"`` makes it a symbolic link where it can be one.
        save_top_k: how many of the best to keep; -1 all, 0 none.
        save_on_exception: save when the run is interrupted, Ctrl-C included.
        save_weights_only: leave out optimizers, schedulers, callbacks.
        mode: whether the smallest (``"min"``) or largest (``"max"``) value is best.
        auto_insert_metric_name: write ``key=`` before each value in the file name.
        every_n_train_steps: save every so many optimizer steps. Excludes the next two.
        train_time_interval: save whenever so much time has passed.
        every_n_epochs: save every so many epochs; 0 never. The default is every epoch.
        save_on_train_epoch_end: act at the end of the training epoch (True) or of validation (False); None: by the
            Trainer's validation schedule.
        enable_version_counter: append ``-v1`` … where a file of the name is there already; False overwrites.
        retention: what to keep, in the place of `save_top_k`, such as ``KeepBest(3) | KeepNewest(2) | KeepEvery(999)``.
            What is kept for another reason than its value is saved when the trigger fires, without waiting for one.
        on_save_error: ``"continue"`` makes a failed save a warning, counted in ``failed_saves``, and trains on.
        name: tells the state of this checkpointer from that of others with the same arguments.

    Raises:
        MisconfigurationException: arguments out of range or contradicting each other.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
        *,
        retention: Rule | None = None,
        on_save_error: OnSaveError = "raise",
        name: str | None = None,
    ) -> None:
        super().__init__()
        policy = resolve_retention(monitor, save_top_k, mode, retention)
        self._trigger = Trigger.resolve(every_n_train_steps, every_n_epochs, train_time_interval)
        self.dirpath = absolute(dirpath)
        check_last(save_last, self.dirpath)
        self.filename = filename
        self.monitor = monitor
        self.verbose = verbose
        self.save_last = save_last
        self.save_top_k = save_top_k
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.mode = mode
        self.auto_insert_metric_name = auto_insert_metric_name
        self.name = name
        self._save_on_train_epoch_end = save_on_train_epoch_end
        self._enable_version_counter = enable_version_counter
        self._saver = Saver(
            policy, weights_only=save_weights_only, on_error=on_save_error, committed=self._on_committed
        )
        self._ledger = self._saver.ledger
        self._followers = Followers(self._saver)
        self._monitor = Monitor(monitor)
        self.current_score: torch.Tensor | None = None
        self._io: Any = None
        self._source = ""
        self._deferred = False  # a trigger fired, its decision waits for a true value of the monitor
        self._done = Done()
        self._clock = 0.0
        self._publish()

    @property
    def state_key(self) -> str:
        """Lightning's key, so that its files and ours find the state; the Trainer tells those of equal key apart."""
        return self._generate_state_key(
            monitor=self.monitor,
            mode=self.mode,
            every_n_train_steps=self._trigger.steps,
            every_n_epochs=self._trigger.epochs,
            train_time_interval=self._trigger.interval,
            **({} if self.name is None else {"name": self.name}),
        )

    @property
    def every_n_epochs(self) -> int | None:
        """How many epochs lie between saves; 0 where another trigger is set."""
        return self._trigger.epochs

    # ---- events of a run

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Fix the directory."""
        if self.dirpath is None:
            self.dirpath = default_dirpath(trainer)
        self.dirpath = trainer.strategy.broadcast(self.dirpath)
        self._ledger.dirpath = self.dirpath
        self._io = trainer.strategy.checkpoint_io
        self._source = os.fspath(trainer.ckpt_path or "")

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Start the clock of the time trigger and apply retention to what was restored."""
        self._clock = time.monotonic()
        self._monitor.begin()
        self._done = Done.resumed(trainer.global_step, has_last=bool(self._ledger.committed.last))
        if not idle(trainer):
            self._followers.decide(trainer, lambda: self._take_up(trainer), self)
        self._publish()

    def _take_up(self, trainer: Trainer) -> None:
        self._saver.take_up(trainer, self.monitor)
        if not self._trigger.never or self.save_last or self.save_on_exception:
            preflight(trainer, self._saver, with_last=bool(self.save_last))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Commit what is done; save where the step or time trigger fires."""
        self._poll(trainer)
        step = trainer.global_step
        if idle(trainer) or step == self._done.fired:
            return
        timed = self._trigger.interval is not None and self._time_is_up(trainer)
        if timed or self._trigger.at_step(step):
            self._clock = time.monotonic()
            self._done.fired = step
            self._followers.decide(trainer, lambda: self._fire(trainer), self)

    def _time_is_up(self, trainer: Trainer) -> bool:
        return bool(trainer.strategy.broadcast(self._trigger.after(time.monotonic() - self._clock)))  # clocks differ

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Save where the epoch trigger acts here, and decide what was waiting for this validation."""
        self._poll(trainer)
        if idle(trainer):
            return
        self._monitor.validated = True
        here = not saves_at_train_epoch_end(trainer, self._save_on_train_epoch_end)
        due = here and self._trigger.at_epoch(trainer.current_epoch)
        self._followers.decide(trainer, lambda: self._act(trainer, due=due), self)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Save where the epoch trigger acts here, decide what is still waiting, refresh the last."""
        self._poll(trainer)
        if not idle(trainer):
            self._followers.decide(trainer, lambda: self._end_epoch(trainer), self)

    def _end_epoch(self, trainer: Trainer) -> None:
        if self._monitor.check(trainer):
            self._deferred = self._deferred or not self._ledger.projected.paths()
        here = saves_at_train_epoch_end(trainer, self._save_on_train_epoch_end)
        self._act(trainer, due=here and self._trigger.at_epoch(trainer.current_epoch))
        self._write(trainer, None)

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Refresh the last, leave a file where a decision is still open and there is none, wait for all commits."""
        self._followers.decide(trainer, lambda: self._end_run(trainer), self)

    def _end_run(self, trainer: Trainer) -> None:
        self._poll(trainer, wait=True)
        if not idle(trainer):
            open_and_empty = self._deferred and not self._ledger.projected.paths()
            self._write(trainer, self._ledger.policy if open_and_empty else None)
        self._poll(trainer, wait=True)

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        """With `save_on_exception` save the state; never replaces `exception` by an error of its own."""
        try:
            self._poll(trainer, wait=True)
            if self.save_on_exception and not idle(trainer) and trainer.global_step > self._done.saved:
                path, _ = self._named(self._metrics(trainer), prefix="exception")
                self._submit(trainer, path, Change(crash=path), None)
                self._poll(trainer, wait=True)
        except Exception as error:
            warnings.warn(f"no checkpoint could be saved after {type(exception).__name__}: {error}", stacklevel=2)

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Wait until what is on its way is committed."""
        self._poll(trainer, wait=True)

    # ---- deciding

    def _fire(self, trainer: Trainer) -> None:
        """The trigger fired: rank the state if the monitored value is of this step, else leave that for later."""
        policy = self._ledger.policy
        self._deferred = not self._decidable(trainer)
        self._write(trainer, policy.unranked if self._deferred else policy)

    def _act(self, trainer: Trainer, *, due: bool) -> None:
        if due or (self._deferred and self._decidable(trainer)):
            self._fire(trainer)

    def _decidable(self, trainer: Trainer) -> bool:
        return self._ledger.policy.k == 0 or self._monitor.decidable(trainer)

    # ---- writing

    def _write(self, trainer: Trainer, policy: Retention | None) -> None:
        """Save the state as an entry, if `policy` wants it, and as the last (with `save_last`), in one go."""
        step, ranked = trainer.global_step, policy is self._ledger.policy
        if step == 0:
            return  # nothing was learned yet
        score = self._monitor.score(trainer, self._metrics(trainer))
        if ranked:
            self.current_score = None if score is None else torch.tensor(score)
        candidate = self._candidate(trainer, score)
        placed = policy is not None and self._done.ranked != step and self._ledger.admits(candidate, policy)
        if not placed and not (self.save_last and step > self._done.last):
            return
        path, complaint = self._entry_path(trainer, candidate) if placed else ("", None)
        change = Change(entry=replace(candidate, path=path)) if placed else Change()
        if self._submit(trainer, path, change, score) and ranked:
            self._done.ranked = step
        if complaint is not None:  # only now: the step is saved
            self._poll(trainer, wait=True)
            raise complaint

    def _submit(self, trainer: Trainer, path: str, change: Change, score: float | None) -> bool:
        step, done = trainer.global_step, self._done
        linkable = callable(getattr(trainer.strategy.checkpoint_io, "link", None))
        link: Link = "symbolic" if self.save_last == "link" else "hard" if linkable else "none"
        # A second name costs nothing: it follows every new file, as a new one of this step may drop the one before.
        last = self._last_path(trainer) if self.save_last and (step > done.last or (path and link != "none")) else ""
        record = describe(trainer, trainer.callback_metrics, self.monitor, score)
        well = self._saver.save(trainer, path, change, record, last=last, link=link)
        if well:
            done.saved, done.last = step, step if last else done.last
        self._poll(trainer)
        return well

    def _poll(self, trainer: Trainer, *, wait: bool = False) -> None:
        self._followers.settle(wait=wait)
        if not self._saver.poll(trainer, wait=wait):
            self._done.forget_saves()

    def _on_committed(self, trainer: Trainer, save: Save) -> None:
        self._publish()
        if self.verbose and trainer.is_global_zero:
            print(f"saved {save.path} (epoch {save.record['epoch']}, step {save.record['step']})")
        for logger in trainer.loggers:
            logger.after_save_checkpoint(self)
