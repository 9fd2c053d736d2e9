"""The Trainer: takes Lightning's arguments, runs the loops, calls the hooks, and hands checkpoints to the strategy."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from milepost import _distributed
from milepost.callbacks.callback import Callback
from milepost.callbacks.checkpoint import Checkpoint
from milepost.data.rng import isolated_rng, run_seed
from milepost.errors import MisconfigurationException, ResumeError
from milepost.strategies.strategy import Strategy
from milepost.trainer import assembly, defaults
from milepost.trainer.datamodule import DataModule
from milepost.trainer.evaluation import EvaluationLoop, check_step_signature
from milepost.trainer.loop import FitLoop
from milepost.trainer.metrics import Metrics
from milepost.trainer.module import Module, takes_argument
from milepost.trainer.optimization import SchedulerConfig, parse_optimizers, require_monitors
from milepost.trainer.resume import resolve_ckpt_path
from milepost.trainer.signals import SignalFlags
from milepost.trainer.state import dump_checkpoint, restore_model, restore_training

if TYPE_CHECKING:
    from milepost.plugins.io.checkpoint_io import Pending


@dataclass
class TrainerState:
    """What the Trainer is doing.

    `fn`: fit, validate, test or predict; `status`: initializing, running, finished or interrupted.
    """

    fn: str | None = None
    status: str = "initializing"
    stage: str | None = None  # train, sanity_check, validate, test, predict

    @property
    def stopped(self) -> bool:
        return self.status in ("finished", "interrupted")


class Trainer:
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
        assembly.refuse_unsupported(
            num_nodes=num_nodes, sync_batchnorm=sync_batchnorm, model_registry=model_registry, profiler=profiler
        )
        dev = int(fast_dev_run)
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
        self.overfit_batches = overfit_batches
        self.check_val_every_n_epoch = check_val_every_n_epoch
        self.val_check_interval, self.val_check_seconds = assembly.validation_interval(
            val_check_interval, check_val_every_n_epoch
        )
        self.num_sanity_val_steps = 0 if plain else 2 if num_sanity_val_steps is None else num_sanity_val_steps
        self.log_every_n_steps = 0 if barebones else 50 if log_every_n_steps is None else log_every_n_steps
        self.accumulate_grad_batches = defaults.positive(accumulate_grad_batches, "accumulate_grad_batches")
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = assembly.clip_algorithm(gradient_clip_algorithm)
        self.inference_mode = inference_mode
        self.detect_anomaly = detect_anomaly
        self.reload_dataloaders_every_n_epochs = reload_dataloaders_every_n_epochs
        self.enable_autolog_hparams = enable_autolog_hparams
        self.default_root_dir = defaults.root_dir(default_root_dir)
        assembly.set_determinism(deterministic, benchmark)

        self.strategy, self.precision_plugin = assembly.strategy_and_precision(
            strategy, accelerator, devices, precision, plugins
        )
        self.loggers = assembly.loggers(logger, self.default_root_dir, enabled=not plain)
        self.callbacks = assembly.callbacks(
            callbacks,
            checkpointing=False if barebones and enable_checkpointing is None else enable_checkpointing,
            default_checkpoint=not plain,
            progress_bar=not barebones if enable_progress_bar is None else enable_progress_bar,
            model_summary=not barebones if enable_model_summary is None else enable_model_summary,
            max_time=self.limits.max_time,
        )
        self.profiler = profiler
        self.state = TrainerState()
        self.should_stop = False
        self.signals = SignalFlags()
        self.ckpt_path: str | None = None
        self.datamodule: DataModule | None = None
        self.loaders: dict[str, Any] = {}
        self.optimizers: list[torch.optim.Optimizer] = []
        self.lr_scheduler_configs: list[SchedulerConfig] = []
        self.data_seed = 0
        self.metrics = Metrics(lambda: self.global_step)
        self.fit_loop = FitLoop(self)
        self.evaluation_loops = {stage: EvaluationLoop(self, stage) for stage in ("validation", "test", "predict")}
        self._warned: set[str] = set()
        self._step_arguments: dict[str, int] = {}

    # ---- entry points --------------------------------------------------------------------------------------------

    def fit(
        self,
        model: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train `model`.

        Args:
            train_dataloaders: one loader, a nested list or dict of them, or a `DataModule`.
            val_dataloaders: loaders to validate on.
            ckpt_path: what to resume from: a path, ``"best"``, ``"last"`` (the newest good checkpoint), ``"hpc"``, or
                ``"auto"`` (the newest good one, or a fresh start where there is none).
            weights_only: False loads checkpoints that hold pickled objects, which runs code of the file.

        Raises:
            CheckpointError: the checkpoint is missing, damaged or unsafe.
            ResumeError: it does not fit this model or run.
        """
        self._run(
            "fit", model, {"train": train_dataloaders, "val": val_dataloaders}, datamodule, ckpt_path, weights_only
        )

    def validate(
        self, model: Module | None = None, dataloaders: Any = None, ckpt_path: Any = None, verbose: bool = True,
        datamodule: DataModule | None = None, weights_only: bool | None = None,
    ) -> list[dict[str, float]]:  # fmt: skip
        """One pass over the validation loaders. Returns a dict of metrics per loader."""
        results: list[dict[str, float]] = self._run(
            "validate", model, {"val": dataloaders}, datamodule, ckpt_path, weights_only
        )
        self._print_results(results, verbose)
        return results

    def test(
        self, model: Module | None = None, dataloaders: Any = None, ckpt_path: Any = None, verbose: bool = True,
        datamodule: DataModule | None = None, weights_only: bool | None = None,
    ) -> list[dict[str, float]]:  # fmt: skip
        """One pass over the test loaders. Returns a dict of metrics per loader."""
        results: list[dict[str, float]] = self._run(
            "test", model, {"test": dataloaders}, datamodule, ckpt_path, weights_only
        )
        self._print_results(results, verbose)
        return results

    def predict(
        self, model: Module | None = None, dataloaders: Any = None, datamodule: DataModule | None = None,
        return_predictions: bool | None = None, ckpt_path: Any = None, weights_only: bool | None = None,
    ) -> list[Any] | None:  # fmt: skip
        """Run `predict_step` over the loaders. Returns the outputs, one list per loader where there are several."""
        predictions: list[Any] = self._run(
            "predict", model, {"predict": dataloaders}, datamodule, ckpt_path, weights_only
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
            checkpoint = dump_checkpoint(self, bool(weights_only))
            pending = self.strategy.save_checkpoint(checkpoint, str(filepath), storage_options)
            self.strategy.barrier("save_checkpoint")
        return pending

    # ---- a run ---------------------------------------------------------------------------------------------------

    def _run(
        self,
        fn: str,
        model: Module | None,
        loaders: dict[str, Any],
        datamodule: Any,
        ckpt_path: Any,
        weights_only: bool | None,
    ) -> Any:
        provided = model is not None
        model = assembly.checked_module(model, self.lightning_module, fn)
        self.loaders, self.datamodule = assembly.checked_data(loaders, datamodule)
        self.state = TrainerState(fn, "running", {"fit": "train"}.get(fn, fn))
        self.should_stop = False
        self.strategy.connect(model)
        self.ckpt_path = resolve_ckpt_path(self, None if ckpt_path is None else str(ckpt_path), model_provided=provided)
        try:
            with self.signals:
                results = self._prepare_and_run(fn, model, weights_only)
        except BaseException as error:
            self.state.status = "interrupted"
            self._tell_of(error)
            raise
        self.state.status, self.state.stage = "finished", None
        return results

    def _tell_of(self, error: BaseException) -> None:
        """Let callbacks save what they can. A failure in there never hides `error`; no collectives on this path."""
        try:
            for callback in self.callbacks:
                callback.on_exception(self, self.lightning_module, error)
        except Exception as second:
            error.add_note(
                f"While callbacks were told of this error, another one occurred: {type(second).__name__}: {second}"
            )
        finally:
            for logger in self.loggers:
                logger.finalize("failed")
            self.strategy.teardown()

    def _prepare_and_run(self, fn: str, model: Module, weights_only: bool | None) -> Any:
        model.trainer = self
        assembly.attach_module_callbacks(self, model)
        if self.datamodule is not None:
            self.datamodule.trainer = self
            self.datamodule.prepare_data()
        model.prepare_data()
        self._call_setup(fn)
        self.call("configure_model")
        checkpoint = self._load(weights_only)
        if checkpoint is not None:
            restore_model(self, checkpoint)
        self.precision_plugin.convert_module(model)
        self.strategy.setup()
        if fn == "fit":
            self._configure_optimizers(model)
            self.call("on_fit_start")
        self._log_hyperparams(model)
        if fn == "fit":
            self.data_seed = run_seed()
            if checkpoint is not None:
                restore_training(self, checkpoint)
            self.fit_loop.optimization.attach(self.optimizers)
        del checkpoint
        with torch.autograd.set_detect_anomaly(self.detect_anomaly):
            results = None
            if fn == "fit":
                self._run_fit()
            else:
                results = self._run_evaluation(fn)
        for logger in self.loggers:
            logger.finalize("success")
        if fn == "fit":
            self.call("on_fit_end")
        self._call_teardown(fn)
        self.strategy.teardown()
        return results

    def _load(self, weights_only: bool | None) -> dict[str, Any] | None:
        if self.ckpt_path is None:
            return None
        checkpoint = self.strategy.load_checkpoint(self.ckpt_path, weights_only=weights_only)
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise ResumeError(
                f"{type(self.strategy.checkpoint_io).__name__} loaded {type(checkpoint).__name__} from"
                f" {self.ckpt_path!r}, which is no checkpoint: load_checkpoint must return the dict that"
                " save_checkpoint was given."
            )
        return checkpoint

    def _run_fit(self) -> None:
        loop = self.fit_loop
        validation = self.evaluation_loops["validation"]
        validation.stream = None
        if self.enable_validation and self.num_sanity_val_steps != 0 and loop.resumed is None:
            self.state.stage = "sanity_check"
            validation.sanity_check(self.num_sanity_val_steps)
            self.state.stage = "train"
        if self.enable_validation:
            validation.load_data()
            check_step_signature(self.lightning_module, "validation", len(validation.num_batches))
        try:
            loop.run()
        finally:
            if loop.stream is not None:
                loop.stream.close()

    def _run_evaluation(self, fn: str) -> Any:
        loop = self.evaluation_loops["validation" if fn == "validate" else fn]
        with isolated_rng():
            self.data_seed = run_seed()
            loop.load_data(force=True)
            if loop.stream is None:
                prefix = {"validate": "val"}.get(fn, fn)
                raise MisconfigurationException(
                    f"`Trainer.{fn}` needs data: define `{prefix}_dataloader`, or pass dataloaders=..."
                )
            check_step_signature(self.lightning_module, loop.stage, len(loop.num_batches))
            results = loop.run()
        if fn != "predict":
            return results
        return loop.predictions[0] if len(loop.predictions) == 1 else loop.predictions

    def run_validation(self) -> None:
        """Called by the fit loop when validation is due."""
        self.state.stage = "validate"
        self.evaluation_loops["validation"].run()
        self.state.stage = "train"

    def _configure_optimizers(self, model: Module) -> None:
        with self.in_hook("configure_optimizers"):
            self.optimizers, self.lr_scheduler_configs = parse_optimizers(model.configure_optimizers())
        if model.automatic_optimization:
            require_monitors(self.lr_scheduler_configs)
        if model.automatic_optimization and len(self.optimizers) > 1:
            raise MisconfigurationException(
                f"configure_optimizers returned {len(self.optimizers)} optimizers: with several, set "
                "`self.automatic_optimization = False` in __init__ and step them in training_step."
            )
        if not model.automatic_optimization and (self.gradient_clip_val or self.accumulate_grad_batches != 1):
            raise MisconfigurationException(
                "gradient_clip_val and accumulate_grad_batches belong to automatic optimization: with "
                "`automatic_optimization = False`, clip with self.clip_gradients and accumulate in training_step."
            )

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
                if callback not in late and (function := getattr(callback, hook, None)) is not None:
                    function(self, module, *args)
            own = getattr(module, hook, None)
            result = own(*args) if own is not None else None
            if hook == "on_train_epoch_end":
                self.metrics.end_epoch()  # with what this hook has logged
            for callback in late:
                if (function := getattr(callback, hook, None)) is not None:
                    function(self, module, *args)
        return result

    def call_step(self, name: str, batch: Any, *position: int) -> Any:
        """Call a step with as many of ``batch_idx, dataloader_idx`` as it takes."""
        step = getattr(self.lightning_module, name)
        count = self._step_arguments.get(name)
        if count is None:
            count = sum(takes_argument(step, argument, n) for argument, n in (("batch_idx", 2), ("dataloader_idx", 3)))
            self._step_arguments[name] = count
        return step(batch, *position[:count])

    @contextmanager
    def in_hook(self, name: str) -> Iterator[None]:
        """Tell ``self.log`` where it is called."""
        module = self.lightning_module
        previous, module._current_hook = module._current_hook, name
        try:
            yield
        finally:
            module._current_hook = previous

    def profile(self, action: str) -> AbstractContextManager[Any]:
        return nullcontext() if self.profiler is None else self.profiler.profile(action)

    def _call_setup(self, fn: str) -> None:
        if self.datamodule is not None:
            self.datamodule.setup(fn)
        self._step_arguments = {}
        self.call("setup", fn)

    def _call_teardown(self, fn: str) -> None:
        if self.datamodule is not None:
            self.datamodule.teardown(fn)
        self.call("teardown", fn)

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

    # ---- metrics and loggers -------------------------------------------------------------------------------------

    def log_step_metrics(self) -> None:
        if not self.log_every_n_steps or (self.logger_step + 1) % self.log_every_n_steps:
            return
        values = self.metrics.step_values()
        self.metrics.logged.update(values)
        self.log_to_loggers(values, self.logger_step)

    def log_epoch_metrics(self, step: int) -> None:
        values = self.metrics.end_epoch()
        self.metrics.reset_metric_objects()
        self.metrics.logged.update(values)
        self.log_to_loggers(values, step)

    def log_to_loggers(self, values: dict[str, Any], step: int) -> None:
        if not values or not self.loggers:
            return
        numbers = {name: float(value) for name, value in values.items()}
        numbers.setdefault("epoch", self.current_epoch)
        for logger in self.loggers:
            logger.log_metrics(numbers, step=step)

    @property
    def logger_step(self) -> int:
        return self.fit_loop.progress.batches_that_stepped

    def _log_hyperparams(self, model: Module) -> None:
        if not self.enable_autolog_hparams or not self.loggers:
            return
        merged = {
            **(self.datamodule.hparams if self.datamodule is not None and self.datamodule._log_hyperparams else {})
        }
        if model._log_hyperparams:
            merged.update(model.hparams)
        for logger in self.loggers:
            logger.log_hyperparams(merged)
            logger.save()

    def _print_results(self, results: list[dict[str, float]], verbose: bool) -> None:
        if verbose and self.is_global_zero and any(results):
            for index, metrics in enumerate(results):
                title = f"DataLoader {index}: " if len(results) > 1 else ""
                print(
                    title
                    + "  ".join(
                        f"{name.split('/dataloader_idx_')[0]}={value:.6g}" for name, value in sorted(metrics.items())
                    )
                )

    # ---- signals -------------------------------------------------------------------------------------------------

    def act_on_signals(self) -> None:
        """At a step boundary: save for a requeue when SLURM, or SIGUSR1, asked for it. The loop then stops."""
        if not self.signals.received:
            return
        if signal.SIGUSR1 in self.signals.received or "SLURM_JOB_ID" in os.environ:
            path = assembly.requeue_path(self.default_root_dir)
            self.save_checkpoint(path).result()

    @property
    def received_sigterm(self) -> bool:
        return self.signals.sigterm

    # ---- names that users read -----------------------------------------------------------------------------------

    @property
    def lightning_module(self) -> Any:
        return self.strategy.lightning_module

    @property
    def model(self) -> Any:
        return self.strategy.model

    @property
    def optimization(self) -> Any:
        return self.fit_loop.optimization

    @property
    def global_step(self) -> int:
        """Optimizer steps taken so far."""
        return self.fit_loop.global_step

    @property
    def current_epoch(self) -> int:
        """Epochs completed so far."""
        return self.fit_loop.progress.epoch.current.completed

    @property
    def is_last_batch(self) -> bool:
        return self.fit_loop.progress.batch.is_last_batch

    @property
    def callback_metrics(self) -> dict[str, torch.Tensor]:
        return self.metrics.callback

    @property
    def metric_steps(self) -> dict[str, int]:
        """For each key of `callback_metrics`, the `global_step` at which it was last logged."""
        return self.metrics.steps

    @property
    def logged_metrics(self) -> dict[str, torch.Tensor]:
        return self.metrics.logged

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        return self.metrics.progress_bar

    @property
    def logger(self) -> Any:
        return self.loggers[0] if self.loggers else None

    @property
    def log_dir(self) -> str | None:
        """The first logger's directory, or `default_root_dir`."""
        if self.loggers:
            return getattr(self.loggers[0], "log_dir", None) or getattr(self.loggers[0], "save_dir", None)
        return self.default_root_dir

    @property
    def checkpoint_callbacks(self) -> list[Checkpoint]:
        return [c for c in self.callbacks if isinstance(c, Checkpoint)]

    @property
    def checkpoint_callback(self) -> Checkpoint | None:
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[Any]:
        return [c for c in self.callbacks if type(c).__name__ == "EarlyStopping"]

    @property
    def early_stopping_callback(self) -> Any:
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def progress_bar_callback(self) -> Any:
        return next((c for c in self.callbacks if hasattr(c, "get_metrics")), None)

    @property
    def enable_validation(self) -> bool:
        from milepost.trainer.sources import has_loaders

        return self.evaluation_loops["validation"].enabled and has_loaders(self, "val")

    @property
    def num_training_batches(self) -> int | float:
        stream = self.fit_loop.stream
        return float("inf") if stream is None else stream.num_batches

    @property
    def num_val_batches(self) -> list[int | float]:
        return self.evaluation_loops["validation"].num_batches

    @property
    def num_sanity_val_batches(self) -> list[int | float]:
        limit = float("inf") if self.num_sanity_val_steps == -1 else self.num_sanity_val_steps
        return [min(limit, n) for n in self.num_val_batches]

    @property
    def num_test_batches(self) -> list[int | float]:
        return self.evaluation_loops["test"].num_batches

    @property
    def num_predict_batches(self) -> list[int | float]:
        return self.evaluation_loops["predict"].num_batches

    @property
    def train_dataloader(self) -> Any:
        return self.loaders.get("train")

    @property
    def val_dataloaders(self) -> Any:
        return self.loaders.get("val")

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps that this fit will take in all. Asking changes nothing: no loader is begun."""
        if self.max_epochs == -1:
            return float("inf") if self.max_steps == -1 else self.max_steps
        self.fit_loop._load_data()
        batches = self.num_training_batches
        if batches == float("inf"):
            return self.max_steps if self.max_steps != -1 else float("inf")
        steps = -(-int(batches) // self.accumulate_grad_batches) * max(self.max_epochs or 0, 1)
        return min(steps, self.max_steps) if self.max_steps != -1 else steps

    @property
    def training(self) -> bool:
        return self.state.stage == "train"

    @property
    def validating(self) -> bool:
        return self.state.stage == "validate"

    @property
    def testing(self) -> bool:
        return self.state.stage == "test"

    @property
    def predicting(self) -> bool:
        return self.state.stage == "predict"

    @property
    def sanity_checking(self) -> bool:
        return self.state.stage == "sanity_check"

    @property
    def evaluating(self) -> bool:
        return self.state.stage in ("validate", "test", "sanity_check")

    @property
    def interrupted(self) -> bool:
        return self.state.status == "interrupted"

    @property
    def precision(self) -> str:
        return self.precision_plugin.precision

    @property
    def scaler(self) -> Any:
        return self.precision_plugin.scaler

    @property
    def global_rank(self) -> int:
        return _distributed.rank()

    @property
    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", 0))

    @property
    def world_size(self) -> int:
        return _distributed.world_size()

    @property
    def is_global_zero(self) -> bool:
        return self.strategy.is_global_zero

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank zero only."""
        if self.is_global_zero:
            print(*args, **kwargs)


def _overrides_transfer(datamodule: DataModule) -> bool:
    names = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    return any(getattr(type(datamodule), n) is not getattr(DataModule, n) for n in names)
