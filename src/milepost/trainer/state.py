"""All that is saved of a run, and how it is put back. *What* is saved is decided here, *how* by the CheckpointIO.

The keys are those of Lightning 2.6, so that its Trainer resumes our files and ours its. What Lightning lacks (random
state, position in the data, accumulated gradients, running means) stands under the one key ``milepost``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from milepost.core.schedules import scheduler_state
from milepost.data.rng import RngState
from milepost.errors import ResumeError
from milepost.plugins.io import checkpoint_io as io_calls
from milepost.plugins.io.form import reader_of
from milepost.strategies.sharding import shard_like
from milepost.trainer.buffers import changed_buffers, restore_buffers
from milepost.trainer.hparams import storable
from milepost.trainer.loading import Loading
from milepost.trainer.metric_state import restore_metric_states
from milepost.trainer.migration import CONTRACT_VERSION, VERSION_KEY, migrate_checkpoint, require_loops, watched_values
from milepost.trainer.parts import EVERY
from milepost.trainer.progress import Phase, evaluation_state, prediction_state
from milepost.trainer.ranks import rank_zeros, split_ranks
from milepost.trainer.standing import Standing, callback_keys, restore_loggers

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer

_COMPILED = "_orig_mod."


def without_compile_prefix(state: Mapping[str, Any]) -> dict[str, Any]:
    """Keys as the uncompiled module has them: torch.compile puts ``_orig_mod.`` into them.

    The versions of the modules, which torch keeps beside the keys of a state dict and asks for when it loads one, stay.
    """
    renamed = OrderedDict((key.replace(_COMPILED, ""), value) for key, value in state.items())
    if versions := getattr(state, "_metadata", None):
        # A compiled module stands before the one in it: the entry that stays is that of the one in it.
        by_path = OrderedDict((without_compiled_part(path), version) for path, version in versions.items())
        renamed._metadata = by_path  # type: ignore[attr-defined]
    return renamed


def without_compiled_part(path: str) -> str:
    """The path of a module as it is where nothing is compiled."""
    return ".".join(part for part in path.split(".") if part != _COMPILED[:-1])


def read_checkpoint(path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
    """Read a checkpoint of a built-in plugin or of Lightning, old ones too, for `load_from_checkpoint`."""
    io = reader_of(path)
    try:
        return migrate_checkpoint(io_calls.load(io, path, map_location=map_location, weights_only=weights_only))
    finally:
        io_calls.teardown(io)


# ---- saving ------------------------------------------------------------------------------------------------------


def dump_checkpoint(trainer: Trainer, weights_only: bool) -> dict[str, Any]:
    """Build the checkpoint of `trainer`'s present state. Consumes no random numbers."""
    module, loop = trainer.lightning_module, trainer.fit_loop
    standing = loop.standing()
    for logger in trainer.loggers:
        logger.save()  # what the checkpoint says was recorded must not be lost
    checkpoint: dict[str, Any] = {
        "epoch": standing.epoch,
        "global_step": trainer.global_step,
        VERSION_KEY: CONTRACT_VERSION,
        "state_dict": without_compile_prefix(trainer.strategy.lightning_module_state_dict()),
        "loops": {
            "fit_loop": standing.loops,
            "validate_loop": evaluation_state(),
            "test_loop": evaluation_state(),
            "predict_loop": prediction_state(),
        },
    }
    if not weights_only:
        states = {
            key: state for key, callback in callback_keys(trainer) if (state := standing.callback_state(key, callback))
        }
        checkpoint["callbacks"] = rank_zeros(trainer, states)
        checkpoint["optimizer_states"] = [
            trainer.strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers
        ]
        checkpoint["lr_schedulers"] = [scheduler_state(config.scheduler) for config in trainer.lr_scheduler_configs]
        if precision := trainer.precision_plugin.state_dict():
            checkpoint[trainer.precision_plugin.state_key] = precision
        checkpoint["milepost"] = split_ranks({**standing.exact, **_beside_position(trainer)}, trainer.strategy)
    _dump_hyper_parameters(checkpoint, module, "")
    if trainer.datamodule is not None:
        _dump_hyper_parameters(checkpoint, trainer.datamodule, "datamodule_")
        if state := trainer.datamodule.state_dict():
            checkpoint[type(trainer.datamodule).__qualname__] = state
    if not weights_only:
        for callback in trainer.callbacks:
            with trainer.profile("on_save_checkpoint", callback):
                callback.on_save_checkpoint(trainer, module, checkpoint)
    module.on_save_checkpoint(checkpoint)
    if trainer.datamodule is not None:
        trainer.datamodule.on_save_checkpoint(checkpoint)
    return checkpoint


def _beside_position(trainer: Trainer) -> dict[str, Any]:
    """What the model's own ``state_dict`` and the optimizers' leave out."""
    loop, module = trainer.fit_loop, trainer.lightning_module
    state: dict[str, Any] = {}
    if changed := changed_buffers(module, loop.initial_buffers):
        state["buffers"] = changed
    if altered := loop.altered():
        state["altered"] = altered
    if loop.gradients_pending or not module.automatic_optimization:
        state["gradients"] = without_compile_prefix(
            {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        )
    return state


def _dump_hyper_parameters(checkpoint: dict[str, Any], owner: Any, prefix: str) -> None:
    if owner.hparams:
        checkpoint[f"{prefix}hparams_name"] = getattr(owner, "_hparams_name", None)
        checkpoint[f"{prefix}hyper_parameters"] = storable(owner.hparams)


# ---- restoring ---------------------------------------------------------------------------------------------------


def restore_model(trainer: Trainer, checkpoint: dict[str, Any], parts: frozenset[str] = EVERY) -> None:
    """Weights, data module and callbacks: before the optimizers exist. Hooks may edit `checkpoint` first."""
    from milepost.trainer.module import load_weights

    module = trainer.lightning_module
    if "model" in parts:
        module.on_load_checkpoint(checkpoint)
        if not trainer.strategy.restores_model:
            load_weights(module, checkpoint, strict=module.strict_loading)
    datamodule = trainer.datamodule
    if datamodule is not None and "datamodule" in parts:
        datamodule.on_load_checkpoint(checkpoint)
        if state := checkpoint.get(type(datamodule).__qualname__):
            datamodule.load_state_dict(state)
    if "callbacks" in parts:
        _restore_callbacks(trainer, checkpoint)


def _restore_callbacks(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    module = trainer.lightning_module
    for callback in trainer.callbacks:
        with trainer.profile("on_load_checkpoint", callback):
            callback.on_load_checkpoint(trainer, module, checkpoint)
    if trainer.state.fn != "fit":
        return  # looking at an old checkpoint must not roll back what the callbacks know of the run
    restore_loggers(trainer, checkpoint.get("milepost", {}).get("loggers", []))
    states = checkpoint.get("callbacks", {})
    for key, callback in callback_keys(trainer):
        if key in states:
            callback.load_state_dict(states[key])
    if missing := sorted(set(states) - {key for key, _ in callback_keys(trainer)}):
        trainer.warn_once(
            f"The checkpoint holds the state of callbacks that this Trainer does not have: {missing}. It is left out;"
            " add them to Trainer(callbacks=...) if it is wanted."
        )


def restore_training(trainer: Trainer, checkpoint: dict[str, Any], parts: frozenset[str] = EVERY) -> None:
    """Precision, counters, optimizers, schedulers, gradients, and the position at which the loop goes on."""
    if "optimizer_states" not in checkpoint and parts & {"optimizer", "scheduler", "loops"}:
        raise ResumeError(
            "The checkpoint holds the model only (it was saved with save_weights_only=True), so training cannot go on"
            " from it. Take the weights alone with fit(restore={'model'}) or load_from_checkpoint."
        )
    precision = trainer.precision_plugin
    if precision.state_key in checkpoint and "precision" in parts:
        precision.load_state_dict(checkpoint[precision.state_key])
    if "loops" in parts:
        require_loops(checkpoint)
        trainer.fit_loop.progress.load_state_dict(checkpoint["loops"]["fit_loop"])
    if "optimizer" in parts and not trainer.strategy.restores_optimizer:
        _restore_optimizers(trainer, checkpoint)
    if "scheduler" in parts:
        _restore_schedulers(trainer, checkpoint)
    if "loops" in parts:
        _restore_position(trainer, checkpoint)
    if exact := checkpoint.get("milepost", {}):
        loop = trainer.fit_loop
        loop.rng_state = RngState.from_state_dict(exact["rng"]) if "rng" in parts else None
        trainer.data_seed = exact["data_seed"] if parts & {"rng", "loops"} else trainer.data_seed


def _restore_position(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    loop = trainer.fit_loop
    exact = checkpoint.get("milepost")
    loop.resumed = loop.phase = Phase(exact["phase"]) if exact else loop.progress.inferred_phase()
    if loop.phase is Phase.BETWEEN_EPOCHS:
        loop.progress.epoch.current.completed = loop.progress.epoch.current.processed
    if trainer.max_epochs not in (None, -1) and trainer.current_epoch > trainer.max_epochs:
        raise ResumeError(
            f"The checkpoint stands at epoch {trainer.current_epoch}, but Trainer(max_epochs={trainer.max_epochs}) ends"
            " before it. Raise max_epochs."
        )
    loop.metrics_lost = exact is None
    if exact:
        _restore_exactly(trainer, checkpoint)
        return
    trainer.metrics.recall(watched_values(checkpoint, trainer.ckpt_path or ""))
    if loop.phase in (Phase.BATCH_END, Phase.VALIDATED, Phase.BATCH_DONE):
        own_states = checkpoint["loops"]["fit_loop"].get("state_dict", {}).get("combined_loader")
        loop.stream_state = {"batches_seen": loop.progress.batch.current.processed, "own_states": own_states}
        if not loop.progress.batch.is_last_batch:
            lacks = "random state" if own_states else "random state nor the order of the data"
            trainer.warn_once(
                f"The checkpoint was written by Lightning in the middle of an epoch: it holds no {lacks}, so the rest"
                " of this epoch is not the one that Lightning would have trained on."
            )


def _restore_exactly(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    loop, module, exact = trainer.fit_loop, trainer.lightning_module, checkpoint["milepost"]
    trainer.evaluation_loops["validation"].seen_batches.update(exact.get("validated_batches", {}))
    trainer.metrics.load_state_dict(exact["metrics"], module)
    restore_metric_states(module, exact.get("metric_objects", {}))
    restore_buffers(module, exact.get("buffers", {}))
    if altered := exact.get("altered"):
        trainer.warn_once(
            f"The checkpoint was written when an error had interrupted a batch that had already changed"
            f" {', '.join(altered)}. That batch is trained on again, so the run is not bit for bit the unbroken one."
            " For that, go on from a checkpoint written at the end of a batch."
        )
    loadings = exact.get("loaders", {})
    for part, name in ((loop.data, "train"), (trainer.evaluation_loops["validation"], "val")):
        part.loading_to_repeat = Loading.from_state_dict(loadings[name]) if name in loadings else None
    loop.stream_state = exact.get("data")
    loop.parts_in_eval = exact.get("in_eval")
    loop.kept = Standing(checkpoint["epoch"], checkpoint["loops"]["fit_loop"], exact)  # until it goes on
    parameters = {name.replace(_COMPILED, ""): p for name, p in module.named_parameters()}
    for name, gradient in exact.get("gradients", {}).items():
        if name in parameters:
            whole = gradient.to(parameters[name].device)
            parameters[name].grad = shard_like(parameters[name], whole)


def _restore_optimizers(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    states = [state for state in checkpoint["optimizer_states"] if state]  # Lightning writes {} where there is none
    if len(states) != len(trainer.optimizers):
        raise ResumeError(
            f"The checkpoint holds {len(states)} optimizers, configure_optimizers returned {len(trainer.optimizers)}."
            " They must be the same to go on; to train on with others, leave them out: fit(restore={'model', ...})."
        )
    for optimizer, state in zip(trainer.optimizers, states, strict=True):
        saved = [len(group["params"]) for group in state["param_groups"]]
        present = [len(group["params"]) for group in optimizer.param_groups]
        if saved != present:
            raise ResumeError(
                f"{type(optimizer).__name__}: the checkpoint's parameter groups hold {saved} parameters, this run's"
                f" {present}. Build the optimizer over the same parameters."
            )
        state = _spread(optimizer, state)
        _load_optimizer(optimizer, state)
        _keep_saved_dtypes(optimizer, state)


def _restore_schedulers(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    schedulers = checkpoint.get("lr_schedulers", [])
    if len(schedulers) != len(trainer.lr_scheduler_configs):
        raise ResumeError(
            f"The checkpoint holds {len(schedulers)} schedulers, configure_optimizers returned"
            f" {len(trainer.lr_scheduler_configs)}."
        )
    for config, state in zip(trainer.lr_scheduler_configs, schedulers, strict=True):
        config.scheduler.load_state_dict(state)


def _spread(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """`state` with this rank's part of the tensors that belong to parameters which are spread over ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    live = dict(zip(numbers, parameters, strict=True))
    spread = {
        number: {k: shard_like(live[number], v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        if number in live else values
        for number, values in state["state"].items()
    }  # fmt: skip
    return {**state, "state": spread}


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load, where torch fills in the options that are younger than the file, and check that nothing is missing."""
    expected = set(optimizer.param_groups[0])
    cause: KeyError | None = None
    try:
        optimizer.load_state_dict(state)
        missing = expected - set(optimizer.param_groups[0]) - {"initial_lr"}
    except KeyError as error:
        missing, cause = {error.args[0]}, error
    if missing:
        raise ResumeError(
            f"The saved optimizer state has no {sorted(missing)}, which {type(optimizer).__name__} needs: it was"
            " saved by another class of optimizer. Use that one, or leave its state out: fit(restore={'model', ...})."
        ) from cause


def _keep_saved_dtypes(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """torch casts moments to the parameter's type on load: fp32 moments of bf16 parameters would lose bits."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for name, value in state["state"].get(number, {}).items():
            live = optimizer.state[parameter].get(name)
            if isinstance(value, torch.Tensor) and isinstance(live, torch.Tensor) and live.dtype != value.dtype:
                optimizer.state[parameter][name] = value.to(live.device, copy=True)
