"""The fit loop, top to bottom: epochs, batches, validation; and where a resumed run enters it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from milepost.data.rng import RngState
from milepost.errors import SIGTERMException
from milepost.trainer.modes import restore_modes
from milepost.trainer.module import UNRECORDED
from milepost.trainer.optimization import Optimization, Reached
from milepost.trainer.pace import Pace
from milepost.trainer.preflight import check_checkpoint
from milepost.trainer.progress import Counts, FitProgress, Phase
from milepost.trainer.signals import save_for_requeue
from milepost.trainer.standing import BeforeBatch, Standing, callback_states, saves_on_exception
from milepost.trainer.training_data import TrainingData

if TYPE_CHECKING:
    from milepost.data.stream import BatchStream
    from milepost.trainer.buffers import Marks
    from milepost.trainer.trainer import Trainer


class FitLoop:
    """Trains. What a restart needs to know of the position is in `progress`, `phase` and the stream's state."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.progress = FitProgress()
        self.pace = Pace(trainer, self.progress)
        self.data = TrainingData(self)
        self.optimization = Optimization(trainer, self.progress)
        self.phase = Phase.BETWEEN_EPOCHS
        self.stream_state: dict[str, Any] | None = None  # of a checkpoint, until the stream is there
        self.rng_state: RngState | None = None  # of a checkpoint, until the loop goes on
        self.parts_in_eval: list[str] | None = None  # of a checkpoint, until the loop goes on
        self.resumed: Phase | None = None
        self.metrics_lost = False  # resumed from a file of Lightning, which keeps no logged values
        self.kept: Standing | None = None  # what checkpoints say of the position where the present one will not do
        self._before: BeforeBatch | None = None  # while a batch is under way
        self.initial_buffers: Marks = {}
        self._undoes = False  # an error in a batch leads to a checkpoint: random state is kept from before each

    # ---- the run -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        trainer = self.trainer
        resumed, self.resumed = self.resumed, None
        if resumed is None:
            self.kept = None
        self.data.load(rebuild=True)
        over = self.pace.done() and resumed is not Phase.EPOCH_END
        if self.data.stream is None or self.data.stream.num_batches == 0 or over:
            return
        if trainer.enable_validation:  # also where its first epoch is far: checkpointers ask whether there is any
            trainer.state.stage = "validate"
            trainer.evaluation_loops["validation"].load_data()
            trainer.state.stage = "train"
        torch.set_grad_enabled(True)
        if resumed is None:
            trainer.metrics.begin_training_epoch()
        self._undoes = saves_on_exception(trainer)
        self.pace.note_validation()
        trainer.call("on_train_start")
        check_checkpoint(trainer)
        while not self.pace.done() or resumed is Phase.EPOCH_END:
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
            while not self.pace.epoch_done():
                if self._run_batch():
                    break
                self._finish_batch()
            if not self.pace.last_batch_reached and self.pace.done():
                # cut short: checkpoints from here on go on with the next batch, as if the epoch had not been ended
                self.kept = Standing.now(self.trainer, Phase.BATCH_DONE).with_callbacks(callback_states(self.trainer))
            self._end_epoch()
        self._close_epoch()

    def _begin_epoch(self, midway: bool, resumed: Phase | None) -> None:
        trainer, progress = self.trainer, self.progress
        if not midway:
            self.data.load()
        assert self.data.stream is not None
        if not midway:
            progress.batch.reset_current()
            for counts in (progress.optimizer_step, progress.zero_grad, progress.scheduler):
                counts.reset_current()
            progress.validation_batch.total = Counts()  # Lightning counts it per training epoch
            progress.epoch.add("ready")
        if midway and self.stream_state is not None:
            self.data.stream.load_state_dict(self.stream_state)
        self.stream_state = None
        if resumed is not Phase.EPOCH_END:
            self.data.stream.begin(progress.epoch.current.processed)
            self.pace.set_batches(self.data.stream.num_batches)
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
        trainer, progress, stream = self.trainer, self.progress, self.data.stream
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
            if not trainer.received_sigterm or trainer.world_size > 1:  # others may not be at this batch
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
                    outputs = self.optimization.run_batch(batch, batch_idx, self.pace.accumulating)
        progress.batch.add("processed")
        self._before, self.phase = None, Phase.BATCH_END
        if not self.pace.accumulating:
            self.optimization.step_schedulers("step", plateau=False, index=batch_idx + 1)
        if self.pace.last_batch_reached:
            self.optimization.step_schedulers("epoch", plateau=False, index=trainer.current_epoch + 1)
        if skip:
            progress.batch.add("completed")
            return True
        trainer.call("on_train_batch_end", outputs, batch, batch_idx)
        progress.batch.add("completed")
        trainer.metrics.end_batch()
        trainer.reports.step(self.pace.accumulating)
        return False

    def _finish_batch(self) -> None:
        """What a batch may bring after its own hooks: validation, plateau schedulers, a stop that was asked for."""
        trainer, progress = self.trainer, self.progress
        if progress.batch.current.completed < progress.batch.current.processed:
            progress.batch.add("completed")  # resumed from inside on_train_batch_end
            trainer.reports.step(self.pace.accumulating)
        if self.pace.validation_due():
            self._validate()
        self._step_plateaus()

    def validated(self) -> None:
        """Told by the validation: only ``on_validation_end`` is still to come."""
        self.kept, self.phase = None, Phase.VALIDATED

    def _step_plateaus(self) -> None:
        trainer, progress = self.trainer, self.progress
        self.kept = None
        if not self.pace.accumulating:
            self.optimization.step_schedulers("step", plateau=True, index=progress.batch.current.ready)
            progress.batches_that_stepped += 1
        self.phase = Phase.BATCH_DONE
        if trainer.should_stop:
            for logger in trainer.loggers:
                logger.save()
        if trainer.stopping.due(progress.batch.total.ready, stepped=not self.pace.accumulating):
            self._stop_for_signal()

    def _validate(self) -> None:
        self.kept = Standing.now(self.trainer, Phase.BATCH_END)  # what is saved in there begins the validation again
        try:
            self.trainer.run_validation(zero_grad=not self.pace.accumulating)
        except SIGTERMException:  # cut short between two of its batches
            self._stop_for_signal()
        self.pace.note_validation()

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
        cut = not self.pace.last_batch_reached
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
        trainer, stream = self.trainer, self.data.stream
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
        return None if self.data.stream is None or between else self.data.stream.state_dict()

    @property
    def gradients_pending(self) -> bool:
        """Whether finished batches have left gradients that no optimizer step has used yet."""
        batch = self.progress.batch
        return batch.current.processed % self.trainer.accumulate_grad_batches != 0 and not batch.is_last_batch

    # ---- names that callbacks read ---------------------------------------------------------------------------------

    @property
    def stream(self) -> BatchStream | None:
        return self.data.stream

    @property
    def accumulating(self) -> bool:
        return self.pace.accumulating

    @property
    def global_step(self) -> int:
        return self.pace.global_step

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
