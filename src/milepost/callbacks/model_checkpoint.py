"""Saves checkpoints while a model trains, and keeps the best and the last."""

from __future__ import annotations

import math
import os
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from milepost.callbacks import _record
from milepost.callbacks._ledger import Save
from milepost.callbacks._monitor import Monitor
from milepost.callbacks._named import NamedCheckpoint
from milepost.callbacks._naming import absolute, default_dirpath
from milepost.callbacks._saver import OnSaveError, Saver, describe
from milepost.callbacks._schedule import Trigger, saves_at_train_epoch_end
from milepost.callbacks._space import preflight
from milepost.engine.retention import Change, Entry, KeepBest, Retention, Rule
from milepost.errors import MisconfigurationException
from milepost.plugins.io import checkpoint_io as capabilities

if TYPE_CHECKING:
    from milepost.trainer.module import Module
    from milepost.trainer.trainer import Trainer


class ModelCheckpoint(NamedCheckpoint):
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
        policy = _policy(monitor, save_top_k, mode, retention)
        self._trigger = Trigger.resolve(every_n_train_steps, every_n_epochs, train_time_interval)
        self.dirpath = absolute(dirpath)
        if save_last == "link" and self.dirpath is not None and "://" in self.dirpath:
            raise ValueError(f"save_last='link' needs a local dirpath, not {self.dirpath!r}: use save_last=True")
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
        self._monitor = Monitor(monitor)
        self.current_score: torch.Tensor | None = None
        self._io: Any = None
        self._source = ""
        self._deferred = False  # a trigger fired, its decision waits for a true value of the monitor
        self._fired_step = self._ranked_step = self._last_step = self._saved_step = 0
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

    @property
    def failed_saves(self) -> int:
        """How many saves have failed, over the restarts of the run."""
        return self._saver.failed_saves

    # ---- events of a run

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Fix the directory."""
        if self.dirpath is None:
            self.dirpath = default_dirpath(trainer)
        self._ledger.dirpath = self.dirpath
        self._io = trainer.strategy.checkpoint_io
        self._source = os.fspath(trainer.ckpt_path or "")

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Start the clock of the time trigger and apply retention to what was restored."""
        self._clock = time.monotonic()
        self._monitor.begin()
        # What was resumed from is saved already, and its trigger has fired.
        self._fired_step = self._saved_step = trainer.global_step
        self._ranked_step = 0
        self._last_step = trainer.global_step if self._ledger.committed.last else 0
        if trainer.is_global_zero and not self._idle(trainer):
            self._saver.prune(trainer)
            self._preflight(trainer)
        self._publish()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Commit what is done; save where the step or time trigger fires."""
        self._poll(trainer)
        step = trainer.global_step
        if self._idle(trainer) or step == self._fired_step:
            return
        timed = self._trigger.after(time.monotonic() - self._clock)
        if timed or self._trigger.at_step(step):
            self._clock = time.monotonic()
            self._fired_step = step
            self._fire(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Save where the epoch trigger acts here, and decide what was waiting for this validation."""
        self._poll(trainer)
        if self._idle(trainer):
            return
        self._monitor.validated = True
        here = not saves_at_train_epoch_end(trainer, self._save_on_train_epoch_end)
        self._act(trainer, due=here and self._trigger.at_epoch(trainer.current_epoch))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Save where the epoch trigger acts here, decide what is still waiting, refresh the last."""
        self._poll(trainer)
        if self._idle(trainer):
            return
        if self._monitor.check(trainer):
            self._deferred = self._deferred or not self._ledger.projected.paths()
        here = saves_at_train_epoch_end(trainer, self._save_on_train_epoch_end)
        self._act(trainer, due=here and self._trigger.at_epoch(trainer.current_epoch))
        self._write(trainer, None)

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Refresh the last, leave a file where a decision is still open and there is none, wait for all commits."""
        self._poll(trainer, wait=True)
        if not self._idle(trainer):
            open_and_empty = self._deferred and not self._ledger.projected.paths()
            self._write(trainer, self._ledger.policy if open_and_empty else None)
        self._poll(trainer, wait=True)

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        """With `save_on_exception` save the state; never replaces `exception` by an error of its own."""
        try:
            self._poll(trainer, wait=True)
            if self.save_on_exception and not self._idle(trainer) and trainer.global_step > self._saved_step:
                self._write_crash(trainer)
                self._poll(trainer, wait=True)
        except Exception as error:
            warnings.warn(f"no checkpoint could be saved after {type(exception).__name__}: {error}", stacklevel=2)

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Wait until what is on its way is committed."""
        self._poll(trainer, wait=True)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """The catalog as it will be once all that is on its way, this very save included, is committed."""
        view = _record.view(self._ledger.projected, self._ledger.policy)
        return {
            "monitor": self.monitor,
            "best_model_score": view.best_model_score,
            "best_model_path": view.best_model_path,
            "current_score": self.current_score,
            "dirpath": self.dirpath,
            "best_k_models": view.best_k_models,
            "kth_best_model_path": view.kth_best_model_path,
            "kth_value": view.kth_value,
            "last_model_path": view.last_model_path,
            "milepost": {
                **_record.encode(self._ledger.projected, self.dirpath or ""),
                "deferred": self._deferred,
                "failed_saves": self.failed_saves,
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the files that `state_dict` lists and that are still there, also where the directory was moved."""
        own = state_dict.get("milepost", {})
        here = self.dirpath or state_dict.get("dirpath") or ""
        self._ledger.committed = _record.restore(state_dict, here, self._source, self._is_there, self._ledger.policy)
        self.current_score = state_dict.get("current_score")
        self._deferred = bool(own.get("deferred", False))
        self._saver.failed_saves = int(own.get("failed_saves", 0))
        self._publish()

    # ---- what users call

    def check_monitor_top_k(self, trainer: Trainer, current: torch.Tensor | None = None) -> bool:
        """Whether a checkpoint with the monitored value `current` would be among the best; None never is."""
        if current is None or self.save_top_k == 0:
            return False
        return self._admits(self._ledger.policy, self._candidate(trainer, float(current)))

    def to_yaml(self, filepath: str | os.PathLike[str] | None = None) -> None:
        """Write ``best_k_models`` (path: score) as YAML, by default to ``best_k_models.yaml`` in the directory."""
        target = Path(filepath) if filepath else Path(self.dirpath or "") / "best_k_models.yaml"
        target.write_text(_record.as_yaml({path: float(score) for path, score in self.best_k_models.items()}))

    # ---- deciding

    def _idle(self, trainer: Trainer) -> bool:
        return bool(trainer.fast_dev_run) or trainer.state.fn != "fit" or trainer.sanity_checking

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

    def _candidate(self, trainer: Trainer, score: float | None) -> Entry:
        return Entry("\0new", score, trainer.global_step, time.time())

    def _admits(self, policy: Retention, candidate: Entry) -> bool:
        return policy.admits(self._ledger.projected.entries, candidate)

    def _preflight(self, trainer: Trainer) -> None:
        if self._trigger.never and not self.save_last and not self.save_on_exception:
            return
        kept = max(self._ledger.policy.k, 0) + bool(self.save_last) - len(self._ledger.committed.paths())
        preflight(
            trainer,
            self._ledger.dirpath,
            places=max(kept, 0) + 1,
            weights_only=self.save_weights_only,
            strict=self._saver.on_error == "raise",
        )

    # ---- writing

    def _write(self, trainer: Trainer, policy: Retention | None) -> None:
        """Save the state as an entry, if `policy` wants it, and as the last (with `save_last`), in one go."""
        step, known = trainer.global_step, self._ledger.policy
        if step == 0:
            return  # nothing was learned yet
        score = self._monitor.score(trainer, self._metrics(trainer))
        ranked = policy is known
        if ranked:
            self.current_score = None if score is None else torch.tensor(score)
        candidate = self._candidate(trainer, score)
        placed = policy is not None and self._ranked_step != step and self._admits(policy, candidate)
        if not placed and not (self.save_last and step > self._last_step):
            return
        path, complaint = self._entry_path(trainer, candidate) if placed else ("", None)
        change = Change(entry=replace(candidate, path=path)) if placed else Change()
        self._submit(trainer, path, change, score, with_last=step > self._last_step)
        self._ranked_step = step if ranked else self._ranked_step
        if complaint is not None:  # only now: the step is saved
            self._poll(trainer, wait=True)
            raise complaint

    def _write_crash(self, trainer: Trainer) -> None:
        path, _ = self._named(self._metrics(trainer), prefix="exception")
        self._submit(trainer, path, Change(crash=path), None, with_last=True)

    def _submit(self, trainer: Trainer, path: str, change: Change, score: float | None, *, with_last: bool) -> None:
        """Save to `path` ("": only as the last) under `change`, and as the last where it is wanted."""
        step = trainer.global_step
        io = trainer.strategy.checkpoint_io
        linked = bool(path) and (self.save_last == "link" or callable(getattr(io, "link", None)))
        last = self._last_path(trainer) if self.save_last and (with_last or linked) else ""
        record = describe(trainer, trainer.callback_metrics, self.monitor, score)
        saves = [Save(last, Change(last=last, crash=change.crash), record=record)] if last and not linked else []
        if path:
            joint = Change(change.entry, last if linked else "", change.crash)
            symbolic = self.save_last == "link"
            saves.insert(0, Save(path, joint, last if linked else "", symbolic, record))
        if self._saver.save(trainer, saves):
            self._saved_step = step
            self._last_step = step if last else self._last_step
        self._poll(trainer)

    def _poll(self, trainer: Trainer, *, wait: bool = False) -> None:
        if not self._saver.poll(trainer, wait=wait):
            self._saved_step = self._last_step = 0  # so that the next occasion is taken

    def _on_committed(self, trainer: Trainer, save: Save) -> None:
        self._publish()
        if self.verbose and trainer.is_global_zero:
            print(f"saved {save.path} (epoch {save.record['epoch']}, step {save.record['step']})")
        for logger in trainer.loggers:
            logger.after_save_checkpoint(self)

    def _publish(self) -> None:
        """Show what is committed in the public attributes."""
        view = _record.view(self._ledger.committed, self._ledger.policy)
        self.best_model_path, self.best_model_score = view.best_model_path, view.best_model_score
        self.best_k_models = view.best_k_models
        self.kth_best_model_path, self.kth_value = view.kth_best_model_path, view.kth_value
        self.last_model_path = view.last_model_path

    def _entry_path(self, trainer: Trainer, candidate: Entry) -> tuple[str, Exception | None]:
        metrics = self._metrics(trainer)
        unknown = candidate.score is not None and not candidate.scored
        if unknown and self.monitor is not None:
            metrics[self.monitor] = math.nan  # never a stale value in a file's name
        path, complaint = self._named(metrics)
        now = self._ledger.projected
        after = now.after(Change(entry=candidate), self._ledger.policy)
        return self._free(trainer, path, own=now.paths() - after.paths()), None if unknown else complaint

    def _last_path(self, trainer: Trainer) -> str:
        path = self.format_checkpoint_name(self._metrics(trainer), filename=self.CHECKPOINT_NAME_LAST)
        return self._free(trainer, path, own=frozenset({self._ledger.projected.last, self._source}))

    def _is_there(self, path: str) -> bool | None:
        return None if self._io is None else capabilities.exists(self._io, path)


def _policy(monitor: str | None, save_top_k: int, mode: str, rule: Rule | None) -> Retention:
    if save_top_k < -1:
        raise MisconfigurationException(f"save_top_k={save_top_k} must be -1 (all), 0 (none) or positive")
    if monitor is None and save_top_k not in (-1, 0, 1):
        raise MisconfigurationException(
            f"save_top_k={save_top_k} needs something to rank by: pass monitor, or save_top_k of -1, 0 or 1"
        )
    if mode not in ("min", "max"):
        raise MisconfigurationException(f"mode={mode!r} must be 'min' or 'max'")
    if rule is not None and save_top_k != 1:
        raise MisconfigurationException(
            f"save_top_k={save_top_k} and retention={rule!r} both say what to keep: write KeepBest({save_top_k}) | ... "
            "in retention alone"
        )
    return Retention(rule or KeepBest(save_top_k), "min" if mode == "min" else "max")
