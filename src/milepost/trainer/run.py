"""One call of fit, validate, test or predict, from its arguments to its teardown. Reads top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from milepost import _distributed
from milepost.data.rng import isolated_rng, run_seed
from milepost.errors import MisconfigurationException, ResumeError
from milepost.trainer import assembly
from milepost.trainer.buffers import mark_buffers
from milepost.trainer.migration import migrate_checkpoint
from milepost.trainer.module import Module
from milepost.trainer.optimization import parse_optimizers, require_attached, require_monitors
from milepost.trainer.parts import EVERY, report, resolve_parts
from milepost.trainer.profiling import begin_profile, end_profile
from milepost.trainer.ranks import agree_on_versions, join_ranks
from milepost.trainer.state import restore_model, restore_training
from milepost.trainer.surface import TrainerState

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer

_log = logging.getLogger("milepost")


def run(
    trainer: Trainer,
    fn: str,
    model: Module | None,
    loaders: dict[str, Any],
    datamodule: Any,
    ckpt_path: Any,
    weights_only: bool | None,
    restore: Iterable[str] | str | None = None,
) -> Any:
    """Run `fn` of `trainer`. Whatever ends it early, the callbacks are told, loggers and strategy are closed."""
    provided, parts = model is not None, resolve_parts(restore)
    trainer.finish_staging()  # of a save between two runs: this one may load other weights
    model = assembly.checked_module(model, trainer.lightning_module, fn)
    trainer.loaders, trainer.datamodule = assembly.checked_data(loaders, datamodule)
    if fn == "fit":
        trainer.fit_loop.data.forget()
    trainer.evaluation_loops[{"fit": "validation", "validate": "validation"}.get(fn, fn)].forget_data()
    trainer.state = TrainerState(fn, "running", {"fit": "train"}.get(fn, fn))
    trainer.should_stop = False
    trainer.strategy.launch()
    trainer.strategy.connect(model)
    agree_on_versions(trainer)
    trainer.stopping.begin()
    _distributed.give_up(over=False)
    trainer.choose_ckpt_path(ckpt_path, model_provided=provided)
    begin_profile(trainer)
    try:
        # all but fit leave the caller's random numbers alone, whatever the hooks of a set-up draw
        with trainer.signals, nullcontext() if fn == "fit" else isolated_rng():
            results = _prepare_and_run(trainer, fn, model, weights_only, parts)
    except BaseException as error:
        trainer.state.status = "interrupted"
        _tell_of(trainer, error)
        raise
    trainer.state.status, trainer.state.stage = "finished", None
    return results


def _tell_of(trainer: Trainer, error: BaseException) -> None:
    """Let callbacks save what they can. A failure in there never hides `error`; no collectives on this path."""
    if trainer.world_size > 1:
        _distributed.give_up()
    try:
        trainer.finish_staging()
        for callback in trainer.callbacks:
            callback.on_exception(trainer, trainer.lightning_module, error)
        if trainer.datamodule is not None:
            trainer.datamodule.on_exception(error)
        trainer.strategy.on_exception(error)
        end_profile(trainer)
    except Exception as second:
        error.add_note(
            "While the callbacks and the data module were told of this error, another one occurred: "
            f"{type(second).__name__}: {second}"
        )
    finally:
        for logger in trainer.loggers:
            logger.finalize("failed")
        trainer.strategy.teardown()


def _prepare_and_run(trainer: Trainer, fn: str, model: Module, weights_only: bool | None, parts: frozenset[str]) -> Any:
    model.trainer = trainer
    assembly.attach_module_callbacks(trainer, model)
    if trainer.datamodule is not None:
        trainer.datamodule.trainer = trainer
        with trainer.profile("prepare_data", trainer.datamodule):
            trainer.datamodule.prepare_data()
    with trainer.profile("prepare_data", model):
        model.prepare_data()
    _call_setup(trainer, fn)
    with trainer.precision_plugin.init_context():
        trainer.call("configure_sharded_model")
        trainer.call("configure_model")
    trainer.precision_plugin.convert_module(model)
    _convert_batchnorm(trainer, model)
    trainer.strategy.shard(trainer)
    checkpoint = _load(trainer, weights_only, parts)
    if checkpoint is not None:
        trainer.restored = _report(trainer, checkpoint, parts)
        restore_model(trainer, checkpoint, parts)
    trainer.metrics.clear()  # of the run before this one
    trainer.strategy.setup(trainer)
    if fn == "fit":
        _configure_optimizers(trainer, model)
        trainer.strategy.take_optimizers(trainer)
        trainer.call("on_fit_start")
    trainer.reports.hyperparams(model)
    if fn == "fit":
        trainer.data_seed = trainer.strategy.broadcast(run_seed())
        model.zero_grad()  # of the run before this one
        trainer.fit_loop.initial_buffers = mark_buffers(model)
        if checkpoint is not None:
            restore_training(trainer, checkpoint, parts)
        trainer.fit_loop.optimization.attach(trainer.optimizers)
    del checkpoint
    with torch.autograd.set_detect_anomaly(trainer.detect_anomaly):
        results = None
        if fn == "fit":
            _fit(trainer)
        else:
            results = _evaluate(trainer, fn)
    if fn == "fit":
        trainer.call("on_fit_end")
    _call_teardown(trainer, fn)
    trainer.strategy.teardown()  # after the hooks, which may save; a save that fails here is no success to the loggers
    trainer.strategy.barrier("end")  # what rank 0 has saved is there for all, in whatever the script does next
    end_profile(trainer)
    for logger in trainer.loggers:
        logger.finalize("success")
    return results


def _convert_batchnorm(trainer: Trainer, model: Module) -> None:
    """With ``sync_batchnorm`` the statistics of batch norm are those of all ranks' batches together."""
    if trainer.sync_batchnorm and trainer.world_size > 1:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]  # children, in place


def _report(trainer: Trainer, checkpoint: dict[str, Any], parts: frozenset[str]) -> dict[str, str]:
    keys = {"datamodule": type(trainer.datamodule).__qualname__, "precision": trainer.precision_plugin.state_key}
    fates = report(checkpoint, parts, **keys)
    if parts != EVERY:
        _log.info("%s: %s", trainer.ckpt_path, ", ".join(f"{part} {fate}" for part, fate in fates.items()))
    return fates


def _call_setup(trainer: Trainer, fn: str) -> None:
    if trainer.datamodule is not None:
        with trainer.profile("setup", trainer.datamodule):
            trainer.datamodule.setup(fn)
    trainer.step_arguments.clear()
    trainer.call("setup", fn)


def _call_teardown(trainer: Trainer, fn: str) -> None:
    if trainer.datamodule is not None:
        with trainer.profile("teardown", trainer.datamodule):
            trainer.datamodule.teardown(fn)
    trainer.call("teardown", fn)


def _load(trainer: Trainer, weights_only: bool | None, parts: frozenset[str]) -> dict[str, Any] | None:
    if trainer.ckpt_path is None:
        return None
    trainer.strategy.parts_to_restore = parts
    checkpoint = trainer.strategy.load_checkpoint(trainer.ckpt_path, weights_only=weights_only)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ResumeError(
            f"{type(trainer.strategy.checkpoint_io).__name__} loaded {type(checkpoint).__name__} from"
            f" {trainer.ckpt_path!r}, which is no checkpoint: load_checkpoint must return the dict that"
            " save_checkpoint was given."
        )
    return join_ranks(migrate_checkpoint(checkpoint), trainer.strategy)


def _fit(trainer: Trainer) -> None:
    loop = trainer.fit_loop
    validation = trainer.evaluation_loops["validation"]
    if trainer.enable_validation and trainer.num_sanity_val_steps != 0 and loop.resumed is None:
        trainer.state.stage = "sanity_check"
        validation.sanity_check(trainer.num_sanity_val_steps)
        trainer.state.stage = "train"
    try:
        loop.run()
    finally:
        validation.close()
        if loop.stream is not None:
            loop.stream.close()


def _evaluate(trainer: Trainer, fn: str) -> Any:
    loop = trainer.evaluation_loops["validation" if fn == "validate" else fn]
    fitted_seed = trainer.data_seed
    with loop.without_gradients():
        trainer.data_seed = trainer.strategy.broadcast(run_seed())
        loop.load_data()
        if not loop.step_defined:
            raise MisconfigurationException(
                f"`Trainer.{fn}` needs {type(trainer.lightning_module).__name__} to define `{loop.stage}_step`."
            )
        if loop.limit == 0:
            return None if fn == "predict" else []
        if loop.stream is None:
            prefix = {"validate": "val"}.get(fn, fn)
            raise MisconfigurationException(
                f"`Trainer.{fn}` needs data: define `{prefix}_dataloader`, or pass dataloaders=..."
            )
        try:
            results = loop.run()
        finally:
            loop.close()
            trainer.data_seed = fitted_seed  # a checkpoint saved after this goes on with the fit
    if fn != "predict":
        return results
    return loop.predictions[0] if len(loop.predictions) == 1 else loop.predictions


def _configure_optimizers(trainer: Trainer, model: Module) -> None:
    with trainer.in_hook("configure_optimizers"), trainer.profile("configure_optimizers", model):
        trainer.optimizers, trainer.lr_scheduler_configs = parse_optimizers(model.configure_optimizers())
    require_attached(trainer.optimizers, trainer.lr_scheduler_configs)
    if model.automatic_optimization:
        require_monitors(trainer.lr_scheduler_configs)
    if model.automatic_optimization and len(trainer.optimizers) > 1:
        raise MisconfigurationException(
            f"configure_optimizers returned {len(trainer.optimizers)} optimizers: with several, set "
            "`self.automatic_optimization = False` in __init__ and step them in training_step."
        )
    if not model.automatic_optimization and (trainer.gradient_clip_val or trainer.accumulate_grad_batches != 1):
        raise MisconfigurationException(
            "gradient_clip_val and accumulate_grad_batches belong to automatic optimization: with "
            "`automatic_optimization = False`, clip with self.clip_gradients and accumulate in training_step."
        )
