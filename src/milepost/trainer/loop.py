"""The fit loop, top to bottom: epochs, batches, validation; and where a resumed run enters it."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from milepost.data.rng import RngState, isolated_rng
from milepost.errors import MisconfigurationException, SIGTERMException
from milepost.trainer.loading import Loading
from milepost.trainer.modes import restore_modes
from milepost.trainer.module import UNRECORDED
from milepost.trainer.optimization import Optimization, Reached
from milepost.trainer.preflight import check_checkpoint
from milepost.trainer.progress import Counts, FitProgress, Phase
from milepost.trainer.signals import save_for_requeue
from milepost.trainer.sources import training_loaders, training_stream
from milepost.trainer.standing import BeforeBatch, Standing, callback_states, saves_on_exception

if TYPE_CHECKING:
    from milepost.data.stream import BatchStream
    from milepost.trainer.buffers import Marks
    from milepost.trainer.trainer import Trainer


class FitLoop:
    """Trains. What a restart needs to know of the position is in `progress`, `phase` and the stream's state."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.progress = FitProgress()
        self.optimization = Optimization(trainer, self.progress)
        self.phase = Phase.BETWEEN_EPOCHS
        self.stream: BatchStream | None = None
        self.stream_state: dict[str, Any] | None = None  # of a checkpoint, until the stream is there
        self.rng_state: RngState | None = None  # of a checkpoint, until the loop goes on
        self.parts_in_eval: list[str] | None = None  # of a checkpoint, until the loop goes on
        self.resumed: Phase | None = None
        self.metrics_lost = False  # resumed from a file of Lightning, which keeps no logged values
        self.kept: Standing | None = None  # what checkpoints say of the position where the present one will not do
        self._before: BeforeBatch | None = None  # while a batch is under way
        self.initial_buffers: Marks = {}
        self.loading: Loading | None = None
        self.loading_to_repeat: Loading | None = None  # of a checkpoint
        self.val_check_batch: int | float = math.inf
        self._loaders: Any = None
        self._last_validation_time = 0.0
        self._undoes = False  # an error in a batch leads to a checkpoint: random state is kept from before each

    # ---- the run -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        trainer = self.trainer
        resumed, self.resumed = self.resumed, None
        if resumed is None:
            self.kept = None
        self.load_data(rebuild=True)
        if self.stream is None or self.stream.num_batches == 0 or (self._done() and resumed is not Phase.EPOCH_END):
            return
        if trainer.enable_validation:  # also where its first epoch is far: checkpointers ask whether there is any
            trainer.state.stage = "validate"
            trainer.evaluation_loops["validation"].load_data()
            trainer.state.stage = "train"
        torch.set_grad_enabled(True)
        if resumed is None:
            trainer.metrics.begin_training_epoch()
        self._undoes = saves_on_exception(trainer)
        self._last_validation_time = time.monotonic()
        trainer.call("on_train_start")
        check_checkpoint(trainer)
        while not self._done() or resumed is Phase.EPOCH_END:
            with trainer.profile("run_training_epoch"):
                self._run_epoch(resumed)
            resumed = None
        self.kept = self.kept or Standing.now(trainer)  # later hooks and the caller may move random state
        trainer.call("on_train_end")

    def _run_epoch(self, resumed: Phase | None) -> None:
        midway = resumed not in (None, Phase.BETWEEN_EPOCHS)
        self._begin_epoch(midway, resumed)
        if resumed is not Phase.EPOCH_END:
            if resumed is Phase.BATCH_END:
                self._finish_batch()
            elif resumed is Phase.VALIDATED:
                self.trainer.end_validation_again()
                self._step_plateaus()
            while not self._epoch_done():
                if self._run_batch():
                    break
                self._finish_batch()
            if not self._last_batch_reached and self._done():
                # cut short: checkpoints from here on go on with the next batch, as if the epoch had not been ended
                self.kept = Standing.now(self.trainer, Phase.BATCH_DONE).with_callbacks(callback_states(self.trainer))
            self._end_epoch()
        self._close_epoch()

    def _begin_epoch(self, midway: bool, resumed: Phase | None) -> None:
        trainer, progress = self.trainer, self.progress
        if not midway:
            self.load_data()
        assert self.stream is not None
        if not midway:
            progress.batch.reset_current()
            for counts in (progress.optimizer_step, progress.zero_grad, progress.scheduler):
                counts.reset_current()
            progress.validation_batch.total = Counts()  # Lightning counts it per training epoch
            progress.epoch.add("ready")
        if midway and self.stream_state is not None:
            self.stream.load_state_dict(self.stream_state)
        self.stream_state = None
        if resumed is not Phase.EPOCH_END:
            self.stream.begin(progress.epoch.current.processed)
        if self.rng_state is not None:  # last of all: making the iterator may have drawn random numbers
            self.rng_state.restore()
            self.rng_state = None
        if self.parts_in_eval is not None:
            restore_modes(trainer.lightning_module, self.parts_in_eval)
            self.parts_in_eval = None
        self.kept = None
        if not midway:
            self.phase = Phase.EPOCH_START
            trainer.call("on_train_epoch_start")
        if not midway or resumed is Phase.EPOCH_START:
            progress.epoch.add("started")
            self.phase = Phase.BATCH_DONE

    def _run_batch(self) -> bool:
        """Train on one batch. Returns whether the rest of the epoch is to be skipped."""
        trainer, progress, stream = self.trainer, self.progress, self.stream
        assert stream is not None
        self._before = BeforeBatch.now(trainer, stream, self._undoes)
        self.optimization.reached = Reached.NOTHING
        try:
            with trainer.profile("[FitLoop].train_dataloader_next"):
                batch, batch_idx, _ = next(stream)
        except StopIteration:  # a loader of unknown length that was shorter than it said
            progress.batch.is_last_batch = True
            self._before = None
            return True
        except RuntimeError:
            if not trainer.received_sigterm:
                raise
            # The signal went to the whole process group and has ended the workers. This batch was not begun.
            self._stop_for_signal()
        progress.batch.is_last_batch = stream.is_last
        batch = trainer.to_device(batch)
        progress.batch.add("ready")
        trainer.metrics.begin_batch(batch)
        outputs, skip = None, False
        if batch is None:
            trainer.warn_once("train_dataloader yielded None; the batch is skipped.")
        else:
            skip = trainer.call("on_train_batch_start", batch, batch_idx) == -1
            if skip:
                progress.batch.is_last_batch = True
            else:
                progress.batch.add("started")
                with trainer.profile("run_training_batch"):
                    outputs = self.optimization.run_batch(batch, batch_idx, self.accumulating)
        progress.batch.add("processed")
        self._before, self.phase = None, Phase.BATCH_END
        if not self.accumulating:
            self.optimization.step_schedulers("step", plateau=False, index=batch_idx + 1)
        if self._last_batch_reached:
            self.optimization.step_schedulers("epoch", plateau=False, index=trainer.current_epoch + 1)
        if skip:
            progress.batch.add("completed")
            return True
        self.phase = Phase.BATCH_END
        trainer.call("on_train_batch_end", outputs, batch, batch_idx)
        progress.batch.add("completed")
        trainer.metrics.end_batch()
        trainer.reports.step(self.accumulating)
        return False

    def _finish_batch(self) -> None:
        """What a batch may bring after its own hooks: validation, plateau schedulers, a stop that was asked for."""
        trainer, progress = self.trainer, self.progress
        if progress.batch.current.completed < progress.batch.current.processed:
            progress.batch.add("completed")  # resumed from inside on_train_batch_end
            trainer.reports.step(self.accumulating)
        if self._validation_due():
            self._validate()
        self._step_plateaus()

    def validated(self) -> None:
        """Told by the validation: only ``on_validation_end`` is still to come."""
        self.kept, self.phase = None, Phase.VALIDATED

    def _step_plateaus(self) -> None:
        trainer, progress = self.trainer, self.progress
        self.kept = None
        if not self.accumulating:
            self.optimization.step_schedulers("step", plateau=True, index=progress.batch.current.ready)
            progress.batches_that_stepped += 1
        self.phase = Phase.BATCH_DONE
        if trainer.should_stop:
            for logger in trainer.loggers:
                logger.save()
        if trainer.received_sigterm:
            self._stop_for_signal()

    def _validate(self) -> None:
        self.kept = Standing.now(self.trainer, Phase.BATCH_END)  # what is saved in there begins the validation again
        try:
            self.trainer.run_validation(zero_grad=not self.accumulating)
        except SIGTERMException:  # cut short between two of its batches
            self._stop_for_signal()
        self._last_validation_time = time.monotonic()

    def _stop_for_signal(self) -> NoReturn:
        save_for_requeue(self.trainer)
        raise SIGTERMException(self.trainer.signals.exit_status)

    def _end_epoch(self) -> None:
        trainer = self.trainer
        self.progress.epoch.add("processed")
        self.phase = Phase.EPOCH_END
        trainer.metrics.end_steps()  # the callbacks of this hook watch the epoch's values, the schedulers too
        trainer.call("on_train_epoch_end", monitors_last=True)

    def _close_epoch(self) -> None:
        trainer, progress = self.trainer, self.progress
        cut = not self._last_batch_reached
        if not cut:
            self.optimization.step_schedulers("epoch", plateau=True, index=trainer.current_epoch + 1)
        trainer.reports.epoch(step=max(progress.batches_that_stepped - 1, 0))
        self.metrics_lost = False
        progress.epoch.add("completed")
        self.phase = Phase.BETWEEN_EPOCHS

    def pass_over_data(self) -> None:
        """Run `training_step` over one more epoch of training batches: no gradients, hooks, records or progress.

        For a callback in `on_train_end` that has changed the weights and needs what the module gathers in its forward
        pass, such as the statistics of batch norm.
        """
        trainer, stream = self.trainer, self.stream
        assert stream is not None
        stream.begin(self.progress.epoch.current.processed)
        with torch.no_grad(), trainer.precision_plugin.forward_context(), trainer.in_hook(UNRECORDED):
            for batch, batch_idx, _ in stream:
                if batch is not None:
                    trainer.call_step("training_step", trainer.to_device(batch), batch_idx)

    def standing(self) -> Standing:
        """The point from which a checkpoint written now goes on."""
        if self.kept is not None:
            return self.kept
        return Standing.now(self.trainer) if self._before is None else self._before.standing(self.trainer)

    def altered(self) -> list[str]:
        """What the batch under way has changed already, if a checkpoint is written inside it."""
        return [] if self._before is None or self.kept is not None else self._before.altered(self.trainer)

    def data_position(self, phase: Phase) -> dict[str, Any] | None:
        """Where in the data a resumed run goes on: after the last batch that was finished. None between epochs."""
        between = phase in (Phase.BETWEEN_EPOCHS, Phase.EPOCH_END)
        return None if self.stream is None or between else self.stream.state_dict()

    @property
    def gradients_pending(self) -> bool:
        """Whether finished batches have left gradients that no optimizer step has used yet."""
        batch = self.progress.batch
        return batch.current.processed % self.trainer.accumulate_grad_batches != 0 and not batch.is_last_batch

    # ---- decisions -----------------------------------------------------------------------------------------------

    @property
    def accumulating(self) -> bool:
        """Whether the current batch only adds to the gradients."""
        boundary = self.progress.batch.current.ready % self.trainer.accumulate_grad_batches == 0
        return not boundary and not self._last_batch_reached

    @property
    def _last_batch_reached(self) -> bool:
        assert self.stream is not None
        return self.progress.batch.current.ready == self.stream.num_batches or self.progress.batch.is_last_batch

    @property
    def global_step(self) -> int:
        module = self.trainer.lightning_module
        manual = module is not None and not module.automatic_optimization
        return (self.progress.manual_step if manual else self.progress.optimizer_step).total.completed

    @property
    def can_stop_early(self) -> bool:
        trainer = self.trainer
        return self.progress.epoch.current.processed >= (trainer.min_epochs or 0) and self.global_step >= (
            trainer.min_steps or 0
        )

    def _steps_done(self) -> bool:
        return self.trainer.max_steps != -1 and self.global_step >= self.trainer.max_steps

    def _done(self) -> bool:
        trainer = self.trainer
        epochs = (
            trainer.max_epochs is not None
            and trainer.max_epochs != -1
            and self.progress.epoch.current.processed >= trainer.max_epochs
        )
        return self._steps_done() or epochs or (trainer.should_stop and self.can_stop_early)

    def _epoch_done(self) -> bool:
        trainer = self.trainer
        if self._steps_done() or (self._last_batch_reached and self.progress.batch.current.ready > 0):
            return True
        if trainer.should_stop and not self.can_stop_early:
            trainer.warn_once(
                f"A stop was asked for, but min_epochs={trainer.min_epochs!r} or min_steps={trainer.min_steps!r} is not"
                " met yet: training goes on."
            )
        return trainer.should_stop and self.can_stop_early

    def _validation_epoch(self) -> bool:
        trainer = self.trainer
        every = trainer.check_val_every_n_epoch
        return trainer.enable_validation and (every is None or (trainer.current_epoch + 1) % every == 0)

    def _validation_due(self) -> bool:
        trainer, progress = self.trainer, self.progress
        if not self._validation_epoch():
            return False
        every = trainer.check_val_every_n_epoch
        last = self._last_batch_reached
        if trainer.should_stop and self.can_stop_early:
            return True
        if trainer.val_check_seconds is not None:
            return time.monotonic() - self._last_validation_time >= trainer.val_check_seconds
        if math.isinf(self.val_check_batch):
            return last
        ready = progress.batch.total.ready if every is None else progress.batch.current.ready
        return ready % int(self.val_check_batch) == 0

    # ---- data ----------------------------------------------------------------------------------------------------

    def load_data(self, rebuild: bool = False) -> None:
        """Ask for the loaders once in a fit, and again where `reload_dataloaders_every_n_epochs` says so.

        With `rebuild` the stream over them is made anew: the seed of the data may have become known since.
        """
        epoch, every = self.progress.epoch.current.processed, self.trainer.reload_dataloaders_every_n_epochs
        due = bool(every) and self.loading is not None and epoch - self.loading.epoch >= every
        again, self.loading_to_repeat = self.loading_to_repeat, None
        if not (rebuild or due or self.loading is None or again is not None):
            return
        if again is not None:
            self._load_data_again(again, due=bool(every) and epoch - again.epoch >= every)
        else:
            if self.loading is None or due:
                self.loading = Loading.now(epoch)
                self._loaders = training_loaders(self.trainer)
            self._build_stream()
        if self.stream is not None:
            self.val_check_batch = self._val_check_batch(self.stream.num_batches)

    def _load_data_again(self, loading: Loading, due: bool) -> None:
        """Resumed: get the loaders that the run had, or, where it was about to ask for new ones, those."""
        if due and self.phase is Phase.BETWEEN_EPOCHS and self.rng_state is not None:
            self.loading = Loading(self.progress.epoch.current.processed, self.rng_state)
            with isolated_rng():
                self.rng_state.restore()
                self._loaders = training_loaders(self.trainer)
                self._build_stream()
                self.rng_state = RngState.capture()
            return
        with loading.repeated(self.trainer):
            self._loaders = training_loaders(self.trainer)
            self._build_stream()
        self.loading = loading
        if self.stream is not None and loading.resting is not None:
            self.stream.load_resting_state(loading.resting)

    def _build_stream(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream = training_stream(self.trainer, self._loaders)

    def forget_data(self) -> None:
        """A new fit asks for its own loaders."""
        if self.stream is not None:
            self.stream.close()
        self.stream, self._loaders, self.loading = None, None, None

    def _val_check_batch(self, batches: int | float) -> int | float:
        trainer = self.trainer
        interval = trainer.val_check_interval
        if trainer.val_check_seconds is not None:
            return math.inf
        if isinstance(interval, int):
            if interval > batches and trainer.check_val_every_n_epoch is not None and trainer.enable_validation:
                raise ValueError(
                    f"val_check_interval={interval} is more than the {batches} training batches of an epoch. Use at"
                    " most that, or check_val_every_n_epoch=None to count batches across epochs, or"
                    " limit_val_batches=0 for no validation."
                )
            return interval
        if math.isinf(batches):
            if interval == 1.0:
                return math.inf
            raise MisconfigurationException(
                f"val_check_interval={interval} is a fraction of an epoch whose length is unknown. Give an int"
                " (batches) or 1.0."
            )
        return max(1, int(batches * interval))

    # ---- names that callbacks read ---------------------------------------------------------------------------------

    @property
    def max_epochs(self) -> int | None:
        """Settable between two fits, so that the second goes on from the first."""
        return self.trainer.max_epochs

    @max_epochs.setter
    def max_epochs(self, value: int | None) -> None:
        self.trainer.max_epochs = value

    @property
    def max_steps(self) -> int:
        return self.trainer.max_steps

    @property
    def epoch_progress(self) -> Any:
        return self.progress.epoch

    @property
    def batch_idx(self) -> int:
        return self.progress.batch.current.ready - 1

    @property
    def total_batch_idx(self) -> int:
        return self.progress.batch.total.ready - 1
