"""The Trainer: takes Lightning's arguments, runs the loops, calls the hooks, and hands checkpoints to the strategy."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from milepost import _distributed
from milepost.callbacks.callback import Callback
from milepost.callbacks.checkpoint import Checkpoint
from milepost.core.schedules import SchedulerConfig
from milepost.profilers.profiler import PassThroughProfiler
from milepost.strategies.strategy import Strategy
from milepost.trainer import assembly, defaults
from milepost.trainer.datamodule import DataModule
from milepost.trainer.evaluation import EvaluationLoop
from milepost.trainer.late_copies import DIRECT, LateCopies
from milepost.trainer.loop import FitLoop
from milepost.trainer.metrics import Metrics
from milepost.trainer.module import Module, refuse_iterator, takes_argument
from milepost.trainer.profiling import profiled
from milepost.trainer.reporting import Reports, print_results
from milepost.trainer.resume import resolve_ckpt_path
from milepost.trainer.run import run
from milepost.trainer.signals import SignalFlags
from milepost.trainer.sources import has_loaders
from milepost.trainer.state import dump_checkpoint
from milepost.trainer.stopping import StopTogether
from milepost.trainer.surface import TrainerState, TrainerSurface

if TYPE_CHECKING:
    from milepost.plugins.io.checkpoint_io import Pending


class Trainer(TrainerSurface):
    """Runs a `Module`. All arguments are keyword-only and carry Lightning's names and meanings.

    Raises:
        MisconfigurationException: arguments that contradict each other, or that this version does not support;
            the message names the remedy.
    """

    def __init__(
        self,
        *,
        accelerator: str = "auto",
        strategy: str | Strategy = "auto",
        devices: Any = "auto",
        num_nodes: int = 1,
        precision: str | int | None = None,
        logger: Any = None,
        callbacks: list[Callback] | Callback | None = None,
        fast_dev_run: int | bool = False,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: str | timedelta | dict[str, int] | None = None,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | str | timedelta | dict[str, int] | None = None,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
        deterministic: bool | str | None = None,
        benchmark: bool | None = None,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        profiler: Any = None,
        detect_anomaly: bool = False,
        barebones: bool = False,
        plugins: Any = None,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: str | os.PathLike[str] | None = None,
        enable_autolog_hparams: bool = True,
        model_registry: str | None = None,
    ) -> None:
        assembly.refuse_unsupported(model_registry=model_registry)
        self.sync_batchnorm = sync_batchnorm
        dev = defaults.dev_batches(fast_dev_run)
        if dev:
            val_check_interval, check_val_every_n_epoch = None, 1
        if barebones:
            assembly.refuse_with_barebones(
                logger=logger, enable_checkpointing=enable_checkpointing, enable_progress_bar=enable_progress_bar,
                enable_model_summary=enable_model_summary, log_every_n_steps=log_every_n_steps,
                num_sanity_val_steps=num_sanity_val_steps, fast_dev_run=fast_dev_run, detect_anomaly=detect_anomaly,
                profiler=profiler,
            )  # fmt: skip
        plain = barebones or bool(dev)
        self.fast_dev_run = fast_dev_run
        self.barebones = barebones
        self.limits = defaults.resolve_limits(
            max_epochs=max_epochs,
            min_epochs=min_epochs,
            max_steps=max_steps,
            min_steps=min_steps,
            max_time=max_time,
            fast_dev_run=dev,
        )
        self.max_epochs, self.min_epochs = self.limits.max_epochs, self.limits.min_epochs
        self.max_steps, self.min_steps = self.limits.max_steps, self.limits.min_steps
        self.limit_train_batches = defaults.batch_limit(limit_train_batches, "limit_train_batches", dev)
        self.limit_val_batches = defaults.batch_limit(limit_val_batches, "limit_val_batches", dev)
        self.limit_test_batches = defaults.batch_limit(limit_test_batches, "limit_test_batches", dev)
        self.limit_predict_batches = defaults.batch_limit(limit_predict_batches, "limit_predict_batches", dev)
        self.overfit_batches = defaults.batch_limit(overfit_batches or 0.0, "overfit_batches", 0)
        if self.overfit_batches:
            self.limit_train_batches = self.limit_val_batches = self.overfit_batches
        self.check_val_every_n_epoch = check_val_every_n_epoch
        self.val_check_interval, self.val_check_seconds = assembly.validation_interval(
            val_check_interval, check_val_every_n_epoch
        )
        self.num_sanity_val_steps = 0 if plain else defaults.sanity_steps(num_sanity_val_steps)
        self.log_every_n_steps = 0 if barebones else 50 if log_every_n_steps is None else log_every_n_steps
        self.accumulate_grad_batches = defaults.positive(accumulate_grad_batches, "accumulate_grad_batches")
        self.gradient_clip_val = assembly.clip_value(gradient_clip_val)
        self.gradient_clip_algorithm = assembly.clip_algorithm(gradient_clip_algorithm)
        self.inference_mode = inference_mode
        self.detect_anomaly = detect_anomaly
        self.reload_dataloaders_every_n_epochs = defaults.not_negative(
            reload_dataloaders_every_n_epochs, "reload_dataloaders_every_n_epochs"
        )
        self.use_distributed_sampler = use_distributed_sampler
        self.enable_autolog_hparams = enable_autolog_hparams
        self.default_root_dir = defaults.root_dir(default_root_dir)
        assembly.set_determinism(deterministic, benchmark)

        self.strategy, self.precision_plugin, preemption = assembly.strategy_and_plugins(
            strategy, accelerator, devices, num_nodes, precision, plugins
        )
        self.loggers = assembly.loggers(logger, self.default_root_dir, enabled=not barebones, writing=not dev)
        self.callbacks = assembly.callbacks(
            callbacks,
            checkpointing=False if barebones and enable_checkpointing is None else enable_checkpointing,
            default_checkpoint=not plain,
            progress_bar=not barebones if enable_progress_bar is None else enable_progress_bar,
            model_summary=not barebones if enable_model_summary is None else enable_model_summary,
            max_time=self.limits.max_time,
        )
        self.profiler = assembly.profiler(profiler)
        self.state = TrainerState()
        self.should_stop = False
        self.signals = SignalFlags(preemption)
        self.stopping = StopTogether(self.signals)
        self._ckpt_path: str | None = None
        self._ckpt_path_set: str | None = None  # by the user, for the runs to come
        self.restored: dict[str, str] = {}  # what became of each part of the checkpoint
        self.datamodule: DataModule | None = None
        self.loaders: dict[str, Any] = {}
        self.optimizers: list[torch.optim.Optimizer] = []
        self.late_copies = LateCopies(self)
        self.lr_scheduler_configs: list[SchedulerConfig] = []
        self.data_seed = 0
        self.metrics = Metrics(lambda: self.global_step)
        self.reports = Reports(self)
        self.fit_loop = FitLoop(self)
        self.evaluation_loops = {stage: EvaluationLoop(self, stage) for stage in ("validation", "test", "predict")}
        self._warned: set[str] = set()
        self.step_arguments: dict[str, int] = {}  # by the step's name: how many arguments it takes after the batch

    # ---- entry points --------------------------------------------------------------------------------------------

    def fit(
        self,
        model: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
        *,
        restore: Iterable[str] | str | None = None,
    ) -> None:
        """Train `model`.

        Args:
            train_dataloaders: one loader, a nested list or dict of them, or a `DataModule`.
            val_dataloaders: loaders to validate on.
            ckpt_path: what to resume from: a path, ``"best"``, ``"last"`` (the newest good checkpoint), ``"hpc"``, or
                ``"auto"`` (the newest good one, or a fresh start where there is none).
            weights_only: False loads checkpoints that hold pickled objects, which runs code of the file.
            restore: the parts to take from the checkpoint, such as ``{"model", "optimizer"}``: model, datamodule,
                callbacks, precision, optimizer, scheduler, loops (the position in the run), rng. None: all of it.
                What became of each is in ``trainer.restored`` then.

        Raises:
            CheckpointError: the checkpoint is missing, damaged or unsafe.
            ResumeError: it does not fit this model or run.
        """
        loaders = {"train": train_dataloaders, "val": val_dataloaders}
        run(self, "fit", model, loaders, datamodule, ckpt_path, weights_only, restore)

    def validate(
        self, model: Module | None = None, dataloaders: Any = None, ckpt_path: Any = None, verbose: bool = True,
        datamodule: DataModule | None = None, weights_only: bool | None = None,
    ) -> list[dict[str, float]]:  # fmt: skip
        """One pass over the validation loaders. Returns a dict of metrics per loader."""
        results: list[dict[str, float]] = run(
            self, "validate", model, {"val": dataloaders}, datamodule, ckpt_path, weights_only
        )
        if verbose and self.is_global_zero and any(results):
            print_results(results)
        return results

    def test(
        self, model: Module | None = None, dataloaders: Any = None, ckpt_path: Any = None, verbose: bool = True,
        datamodule: DataModule | None = None, weights_only: bool | None = None,
    ) -> list[dict[str, float]]:  # fmt: skip
        """One pass over the test loaders. Returns a dict of metrics per loader."""
        results: list[dict[str, float]] = run(
            self, "test", model, {"test": dataloaders}, datamodule, ckpt_path, weights_only
        )
        if verbose and self.is_global_zero and any(results):
            print_results(results)
        return results

    def predict(
        self, model: Module | None = None, dataloaders: Any = None, datamodule: DataModule | None = None,
        return_predictions: bool | None = None, ckpt_path: Any = None, weights_only: bool | None = None,
    ) -> list[Any] | None:  # fmt: skip
        """Run `predict_step` over the loaders. Returns the outputs, one list per loader where there are several."""
        predictions: list[Any] = run(
            self, "predict", model, {"predict": dataloaders}, datamodule, ckpt_path, weights_only
        )
        return None if return_predictions is False else predictions

    def save_checkpoint(
        self, filepath: str | os.PathLike[str], weights_only: bool | None = None, storage_options: Any = None
    ) -> Pending:
        """Save the present state. Call it on all ranks. Returns a handle that is done once the checkpoint is durable.

        Args:
            weights_only: leave out optimizers, callbacks and the position; such a file cannot be resumed from.

        Raises:
            AttributeError: there is no model yet.
            CheckpointSaveError: writing failed (for an asynchronous plugin: from the handle, or at the next save).
        """
        if self.lightning_module is None:
            raise AttributeError("save_checkpoint needs a model: call fit, validate, test or predict first.")
        with self.profile("save_checkpoint"):
            if self.strategy.saves_on_every_rank and self.state.status != "interrupted":
                self.strategy.before_saving()
            checkpoint = dump_checkpoint(self, bool(weights_only))
            self.strategy.stepping_optimizers = self.late_copies.optimizers()
            try:
                if self.state.status == "interrupted":
                    return self.strategy.save_checkpoint_alone(checkpoint, str(filepath))
                return self.strategy.save_checkpoint(checkpoint, str(filepath), storage_options)
            finally:  # whoever calls the strategy's by itself has vouched for none
                self.strategy.stepping_optimizers = ()

    def finish_staging(self) -> None:
        """Wait until what is being saved is copied. Call it before writing to weights inside of `training_step`.

        It matters to plugins with ``lazy=True`` only, and not after an optimizer's step, which has waited itself.
        """
        self.late_copies.finish()

    @property
    def ckpt_path(self) -> str | None:
        """The checkpoint that the run went on from. Assign a path or name, and the runs to come start from there."""
        return self._ckpt_path

    @ckpt_path.setter
    def ckpt_path(self, path: str | os.PathLike[str] | None) -> None:
        self._ckpt_path = self._ckpt_path_set = None if path is None else os.fspath(path)

    def choose_ckpt_path(self, given: str | os.PathLike[str] | None, *, model_provided: bool) -> None:
        """Called when a run begins: what the call was `given` goes before what was assigned to `ckpt_path`."""
        if given is not None and self._ckpt_path_set is not None:
            warnings.warn(
                f"trainer.ckpt_path was set to {self._ckpt_path_set!r}, but {self.state.fn} was given"
                f" ckpt_path={os.fspath(given)!r}: going on from the latter.",
                stacklevel=2,
            )
            self._ckpt_path_set = None
        asked = self._ckpt_path_set if given is None else given
        self._ckpt_path = _distributed.on_rank_zero(
            lambda: resolve_ckpt_path(self, asked, model_provided=model_provided)
        )

    @property
    def enable_validation(self) -> bool:
        return self.evaluation_loops["validation"].enabled and has_loaders(self, "val")

    def end_validation_again(self) -> None:
        """Called by the fit loop when it goes on from a save in ``on_validation_end``."""
        self.state.stage = "validate"
        self.evaluation_loops["validation"].end_again()
        self.state.stage = "train"

    def run_validation(self, *, zero_grad: bool) -> None:
        """Called by the fit loop when validation is due; with `zero_grad`, gradients are freed before."""
        self.state.stage = "validate"
        try:
            self.finish_staging()
            if zero_grad:
                self.lightning_module.on_validation_model_zero_grad()
            self.evaluation_loops["validation"].run()
        finally:
            self.state.stage = "train"

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def call(self, hook: str, *args: Any, monitors_last: bool = False) -> Any:
        """Call `hook` on the callbacks, then the module, then the checkpointers; return what the module's returned.

        Checkpointers come last so that what they save is what the step left behind, the module's own hook included.
        With `monitors_last`, callbacks that watch a metric come after the module too: it may log in this very hook.
        """
        module = self.lightning_module
        late = [
            c
            for c in self.callbacks
            if isinstance(c, Checkpoint) or (monitors_last and getattr(c, "monitor", None) is not None)
        ]
        with self.in_hook(hook):
            for callback in self.callbacks:
                if callback not in late:
                    self._call_one(callback, hook, self, module, *args)
            result = self._call_one(module, hook, *args)
            try:
                for callback in late:
                    self.late_copies.caller = (callback, hook)
                    self._call_one(callback, hook, self, module, *args)
            finally:
                self.late_copies.caller = None
        return result

    def _call_one(self, owner: Any, hook: str, *args: Any) -> Any:
        function = getattr(owner, hook, None)
        if function is None:
            return None
        self.late_copies.before(function)
        if isinstance(self.profiler, PassThroughProfiler):  # called several times in each step: no context for nothing
            return function(*args)
        with self.profile(hook, owner):
            return function(*args)

    def call_step(self, name: str, batch: Any, *position: int) -> Any:
        """Call a step with as many of ``batch_idx, dataloader_idx`` as it takes."""
        step = getattr(self.lightning_module, name)
        count = self.step_arguments.get(name)
        if count is None:
            refuse_iterator(step, name)
            count = sum(takes_argument(step, argument, n) for argument, n in (("batch_idx", 2), ("dataloader_idx", 3)))
            self.step_arguments[name] = count
        return step(batch, *position[:count])

    @property
    def steps_defined(self) -> list[str]:
        """Names of the steps that the module has."""
        names = ("training_step", "validation_step", "test_step", "predict_step")
        return [name for name in names if getattr(type(self.lightning_module), name) is not getattr(Module, name)]

    def training_call(self, batch: Any, *position: int) -> Any:
        """The module's `training_step`, for the strategy to run."""
        return self.call_step("training_step", batch, *position)

    @contextmanager
    def in_hook(self, name: str) -> Iterator[None]:
        """Tell ``self.log`` where it is called."""
        module = self.lightning_module
        if name in DIRECT:
            self.late_copies.before(getattr(module, name))
        previous, module._current_hook = module._current_hook, name
        try:
            yield
        finally:
            module._current_hook = previous

    def profile(self, action: str, owner: Any = None) -> AbstractContextManager[Any]:
        """Measure what is inside, as `action` of `owner`."""
        return profiled(self.profiler, action, owner)

    def warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=2)

    def to_device(self, batch: Any, dataloader_idx: int = 0) -> Any:
        module = self.lightning_module
        batch = self.precision_plugin.convert_input(batch)
        owner = self.datamodule if self.datamodule is not None and _overrides_transfer(self.datamodule) else module
        batch = owner.on_before_batch_transfer(batch, dataloader_idx)
        batch = owner.transfer_batch_to_device(batch, self.strategy.root_device, dataloader_idx)
        return owner.on_after_batch_transfer(batch, dataloader_idx)


def _overrides_transfer(datamodule: DataModule) -> bool:
    names = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    return any(getattr(type(datamodule), n) is not getattr(DataModule, n) for n in names)
