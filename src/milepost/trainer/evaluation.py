"""The loops of validate, test and predict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from milepost.data.rng import isolated_rng
from milepost.errors import MisconfigurationException, SIGTERMException
from milepost.trainer.loading import Loading
from milepost.trainer.module import Module, is_overridden, takes_argument
from milepost.trainer.progress import Progress
from milepost.trainer.sources import evaluation_stream

if TYPE_CHECKING:
    from milepost.data.stream import BatchStream
    from milepost.trainer.trainer import Trainer

_PREFIX = {"validation": "val", "test": "test", "predict": "predict"}


class EvaluationLoop:
    """Runs one of the three; `stage` is the word in its hooks: ``validation``, ``test`` or ``predict``."""

    def __init__(self, trainer: Trainer, stage: str) -> None:
        self.trainer = trainer
        self.stage = stage
        self.stream: BatchStream | None = None
        self.predictions: list[list[Any]] = []
        self.loading: Loading | None = None
        self.loading_to_repeat: Loading | None = None  # of a checkpoint
        self.interrupted_modes: dict[torch.nn.Module, bool] | None = None  # of training, while this runs
        self.seen_batches: dict[int, int] = {}  # of each loader, over all runs since the loaders were asked for

    @property
    def num_batches(self) -> list[int | float]:
        if self.stream is None:
            return []
        batches = self.stream.num_batches
        return list(batches) if isinstance(batches, list) else [batches]

    @property
    def enabled(self) -> bool:
        """Whether there is anything to run: a step is defined, batches are not limited to none."""
        return self.step_defined and self.limit != 0

    @property
    def step_defined(self) -> bool:
        """Whether the module has a step of this stage; the one of `predict` calls the module where it has none."""
        module = self.trainer.lightning_module
        return self.stage == "predict" or is_overridden(f"{self.stage}_step", module, Module)

    @property
    def limit(self) -> int | float:
        """The Trainer's ``limit_*_batches`` for this loop."""
        limit: int | float = getattr(self.trainer, f"limit_{_PREFIX[self.stage]}_batches")
        return limit

    def forget_data(self) -> None:
        """A new run asks for its own loaders."""
        self.close()
        self.stream = None

    def load_data(self) -> None:
        """Ask for the loaders, again only when `reload_dataloaders_every_n_epochs` says so."""
        every, epoch = self.trainer.reload_dataloaders_every_n_epochs, self.trainer.current_epoch
        due = bool(every) and self.loading is not None and epoch - self.loading.epoch >= every
        if not (self.stream is None or due):
            return
        self.close()
        again, self.loading_to_repeat = self.loading_to_repeat, None
        self.loading = again or Loading.now(epoch)
        with nullcontext() if again is None else again.repeated(self.trainer):
            self.stream = evaluation_stream(self.trainer, _PREFIX[self.stage], self.limit)
        if again is None:  # else the count comes from the checkpoint
            self.seen_batches = {}
        if again is not None and again.resting is not None and self.stream is not None:
            self.stream.load_resting_state(again.resting)
        check_step_signature(self.trainer.lightning_module, self.stage, len(self.num_batches))

    def close(self) -> None:
        """Let loader workers go."""
        if self.stream is not None:
            self.stream.close()

    def without_gradients(self) -> AbstractContextManager[Any]:
        """The mode of an evaluation, its data and hooks included.

        Not inference mode inside fit: what a hook makes there and keeps could not be trained with afterwards.
        """
        trainer = self.trainer
        return torch.inference_mode() if trainer.inference_mode and trainer.state.fn != "fit" else torch.no_grad()

    def run(self, max_batches: int | None = None) -> list[dict[str, float]]:
        """One pass over the loaders. Returns one dict of metrics per loader."""
        with self.without_gradients():
            return self._run(max_batches)

    def _run(self, max_batches: int | None) -> list[dict[str, float]]:
        trainer, stage = self.trainer, self.stage
        self.load_data()
        stream = self.stream
        if stream is None or not self.enabled or sum(self.num_batches) == 0:
            return []
        module = trainer.lightning_module
        trainer.strategy.before_evaluation()
        modes = self.interrupted_modes = {m: m.training for m in module.modules()}
        interrupted = trainer.metrics.begin_evaluation()
        getattr(module, f"on_{stage}_model_eval")()
        self.predictions = [[] for _ in self.num_batches]
        try:
            trainer.call(f"on_{stage}_start")
            trainer.call(f"on_{stage}_epoch_start")
            per_loader = self._run_batches(stream, max_batches)
            trainer.call(f"on_{stage}_epoch_end")
            results = self._publish(per_loader)
            if trainer.validating and trainer.state.fn == "fit":
                trainer.fit_loop.validated()
            trainer.call(f"on_{stage}_end")
        finally:  # a signal may cut it short; what is saved then is the state of training
            trainer.metrics.end_evaluation(interrupted)
            self.interrupted_modes = None
            self._restore_modes(module, modes)
        return results

    def _run_batches(self, stream: BatchStream, max_batches: int | None) -> list[dict[str, Any]]:
        """Returns the values that each loader's batches have logged."""
        trainer = self.trainer
        several = len(self.num_batches) > 1
        values: list[dict[str, Any]] = [{} for _ in self.num_batches]
        reading = 0
        progress = self._progress
        progress.reset_current()
        # the data's own randomness never moves the model's: validating or not leaves training bit-identical
        stream.begin(trainer.current_epoch)
        for batch, batch_idx, dataloader_idx in self._fetched(stream):
            if max_batches is not None and batch_idx >= max_batches:
                if dataloader_idx == len(self.num_batches) - 1:
                    break
                continue
            if dataloader_idx != reading:
                values[reading] = trainer.metrics.end_loader(dataloader_idx)
                reading = dataloader_idx
            progress.is_last_batch = stream.is_last
            self._run_batch(batch, batch_idx, dataloader_idx, several, progress)
            # of several ranks that train, those that were sent no signal would go on without this one
            if trainer.received_sigterm and (trainer.world_size == 1 or trainer.state.fn != "fit"):
                raise SIGTERMException(trainer.signals.exit_status)
        values[reading] = trainer.metrics.end_loader()
        return values

    def _fetched(self, stream: BatchStream) -> Iterator[tuple[Any, int, int]]:
        end = object()
        while True:
            with self.trainer.profile(f"[EvaluationLoop].{_PREFIX[self.stage]}_next"):
                item: Any = next(stream, end)
            if item is end:
                return
            yield item

    @property
    def _progress(self) -> Progress:
        """The counts that are saved, for a validation inside fit; others start from nothing each time."""
        within_fit = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        return self.trainer.fit_loop.progress.validation_batch if within_fit else Progress()

    def _run_batch(self, batch: Any, batch_idx: int, dataloader_idx: int, several: bool, progress: Progress) -> None:
        trainer, stage = self.trainer, self.stage
        progress.add("ready")
        batch = trainer.to_device(batch, dataloader_idx)
        trainer.metrics.begin_batch(batch, dataloader_idx if several else None)
        position = (batch, batch_idx, dataloader_idx) if several else (batch, batch_idx)
        trainer.call(f"on_{stage}_batch_start", *position)
        progress.add("started")
        with (
            trainer.precision_plugin.forward_context(),
            trainer.in_hook(f"{stage}_step"),
            trainer.profile(f"{stage}_step", trainer.strategy),
        ):
            output = trainer.call_step(f"{stage}_step", *position)
        progress.add("processed")
        trainer.call(f"on_{stage}_batch_end", output, *position)
        progress.add("completed")
        trainer.metrics.end_batch()
        if stage == "predict":
            self.predictions[dataloader_idx].append(output)
        elif not trainer.sanity_checking:
            seen = self.seen_batches.get(dataloader_idx, 0)
            self.seen_batches[dataloader_idx] = seen + 1
            trainer.reports.send(trainer.metrics.step_values(), step=seen, with_epoch=False)

    def _publish(self, per_loader: list[dict[str, Any]]) -> list[dict[str, float]]:
        """Report the evaluation's values. `per_loader` holds those of the batches; hooks after them add to each."""
        trainer = self.trainer
        late = trainer.metrics.end_loader()
        if not trainer.sanity_checking:
            merged = {name: value for values in per_loader for name, value in values.items()}
            trainer.reports.send(merged | late, step=trainer.logger_step)
        return [{name: float(value) for name, value in (values | late).items()} for values in per_loader]

    def end_again(self) -> None:
        """What came after the save in ``on_validation_end``: from eval mode back to that of training."""
        module = self.trainer.lightning_module
        modes = {part: part.training for part in module.modules()}
        with self.without_gradients():
            module.eval()
            self._restore_modes(module, modes)

    def _restore_modes(self, module: Module, modes: dict[torch.nn.Module, bool]) -> None:
        name = f"on_{self.stage}_model_train"
        if is_overridden(name, module, Module):
            getattr(module, name)()
            return
        for part, training in modes.items():
            part.training = training

    def sanity_check(self, batches: int) -> None:
        """Run a few validation batches before training: mistakes show at once. Random state is put back."""
        trainer = self.trainer
        if not self.enabled or batches == 0:
            return
        with isolated_rng():
            trainer.call("on_sanity_check_start")
            self.run(max_batches=None if batches == -1 else batches)
            trainer.call("on_sanity_check_end")
        trainer.metrics.clear()


def check_step_signature(module: Module, stage: str, loaders: int) -> None:
    """Several loaders need a step that takes `dataloader_idx`.

    Raises:
        MisconfigurationException: it does not.
    """
    step = getattr(module, f"{stage}_step")
    if loaders > 1 and not takes_argument(step, "dataloader_idx", 3):
        raise MisconfigurationException(
            f"{stage}_step of {type(module).__name__} does not take `dataloader_idx`, but there are {loaders} loaders."
            " Add the argument."
        )
