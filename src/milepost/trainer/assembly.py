"""Puts together what a Trainer consists of, and refuses what cannot work, at construction."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from milepost import _optional, profilers
from milepost.callbacks.callback import Callback
from milepost.callbacks.checkpoint import Checkpoint
from milepost.errors import MisconfigurationException
from milepost.plugins.io import checkpoint_io as io_calls
from milepost.plugins.preemption import Preemption
from milepost.precision.precision import Precision
from milepost.profilers.profiler import PassThroughProfiler
from milepost.strategies.names import strategy_of
from milepost.strategies.strategy import Strategy
from milepost.trainer import defaults
from milepost.trainer.datamodule import DataModule
from milepost.trainer.module import Module

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer


def refuse_unsupported(*, model_registry: str | None) -> None:
    """Arguments of Lightning's Trainer that this version does not have say so, with the remedy."""
    if model_registry is not None:
        raise defaults.refuse("model_registry", model_registry, "there is no model registry. Give ckpt_path a path.")


def profiler(given: Any) -> Any:
    """The profiler for the ``profiler`` argument: an object, or one of Milepost's by its name."""
    named = {"simple": "SimpleProfiler", "advanced": "AdvancedProfiler", "pytorch": "PyTorchProfiler"}
    if given is None:
        return PassThroughProfiler()
    if isinstance(given, str) and given in named:
        return getattr(profilers, named[given])()
    if isinstance(given, str) or not hasattr(given, "profile"):
        raise defaults.refuse(
            "profiler",
            given,
            f"give one of {sorted(named)}, or an object with a `profile(name)` context manager, such as one of"
            " milepost.profilers.",
        )
    return given


def refuse_with_barebones(**given: Any) -> None:
    """``barebones`` measures raw speed: what slows a run down cannot be asked for beside it."""
    for name, value in given.items():
        if value:
            raise MisconfigurationException(
                f"Trainer(barebones=True, {name}={value!r}): barebones switches it off to measure raw speed. Leave one"
                " of the two out."
            )


def validation_interval(value: Any, every_n_epoch: int | None) -> tuple[int | float, float | None]:
    """Resolve ``val_check_interval``: batches (int), a fraction of the epoch (float), or seconds (second item)."""
    if every_n_epoch is not None and (not isinstance(every_n_epoch, int) or every_n_epoch < 1):
        raise MisconfigurationException(
            f"check_val_every_n_epoch={every_n_epoch!r}: give an int of at least 1, or None to count batches across"
            " epochs."
        )
    if value is None:
        return 1.0, None
    if isinstance(value, (str, dict, timedelta)):
        duration = defaults.parse_duration(value, "val_check_interval")
        assert duration is not None
        return 1.0, duration.total_seconds()
    if isinstance(value, float) and value > 1.0 and value.is_integer():
        value = int(value)
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or value <= 0
        or (isinstance(value, float) and value > 1.0)
    ):
        raise MisconfigurationException(
            f"val_check_interval={value!r}: give a number of batches (int ≥ 1), a fraction of an epoch (float up to"
            " 1.0), or a duration."
        )
    if every_n_epoch is None and isinstance(value, float):
        raise MisconfigurationException(
            f"check_val_every_n_epoch=None counts batches across epochs, so val_check_interval={value!r} must be an"
            " int."
        )
    return value, None


def clip_value(value: Any) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise MisconfigurationException(f"gradient_clip_val={value!r}: give a number, or None for no clipping.")
    return value


def clip_algorithm(value: str | None) -> str | None:
    if value not in (None, "norm", "value"):
        raise MisconfigurationException(f"gradient_clip_algorithm={value!r}: use 'norm' or 'value'.")
    return value


def set_determinism(deterministic: bool | str | None, benchmark: bool | None) -> None:
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=deterministic == "warn")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if benchmark is not None or deterministic:
        torch.backends.cudnn.benchmark = bool(benchmark) and not deterministic


def strategy_and_plugins(
    strategy: str | Strategy,
    accelerator: str,
    devices: Any,
    num_nodes: int,
    precision: str | int | None,
    plugins: Any,
) -> tuple[Strategy, Precision, Preemption]:
    """Build what `plugins` and the arguments say, and give the strategy the CheckpointIO found among them."""
    given = [] if plugins is None else list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
    ios = [p for p in given if io_calls.is_checkpoint_io(p)]
    precisions = [p for p in given if isinstance(p, Precision)]
    preemptions = [p for p in given if isinstance(p, Preemption)]
    if wrong := [p for p in given if not any(p in known for known in (ios, precisions, preemptions))]:
        raise MisconfigurationException(
            f"Found invalid type for plugin {wrong[0]!r}: expected a CheckpointIO (save_checkpoint, load_checkpoint, "
            "remove_checkpoint), a Precision or a Preemption."
        )
    for kind, found in (("CheckpointIO", ios), ("Precision", precisions), ("Preemption", preemptions)):
        if len(found) > 1:
            raise MisconfigurationException(
                f"Received {len(found)} values for {kind} in `plugins`; expected one at most."
            )
    built = strategy_of(strategy, accelerator, devices, num_nodes)
    if ios:
        if built.has_own_checkpoint_io:
            raise MisconfigurationException("checkpoint_io set through both strategy class and plugins, choose one.")
        built.checkpoint_io = ios[0]
    if precisions and precision is not None:
        raise MisconfigurationException(f"precision={precision!r} and a Precision plugin were given, choose one.")
    chosen = precisions[0] if precisions else built.make_precision(precision)
    built.check_precision(chosen)
    return built, chosen, preemptions[0] if preemptions else Preemption()


def loggers(given: Any, directory: str, *, enabled: bool, writing: bool) -> list[Any]:
    """The loggers for the ``logger`` argument: TensorBoard where it is installed, else CSV, unless others are given.

    One that writes nothing, where they are not to be `writing`.
    """
    if not enabled or given is False:
        return []
    if not writing:
        from milepost.loggers.logger import DummyLogger

        return [DummyLogger()]
    if given is None or given is True:
        if _optional.available("tensorboard"):
            from milepost.loggers.tensorboard import TensorBoardLogger

            return [TensorBoardLogger(directory)]
        from milepost.loggers.csv_logs import CSVLogger

        return [CSVLogger(directory)]
    found = list(given) if isinstance(given, Iterable) else [given]
    for logger in found:
        if not hasattr(logger, "log_metrics"):
            raise MisconfigurationException(
                f"logger={given!r}: {logger!r} is not a Logger. Give one of milepost.loggers, a list of them, or False."
            )
    return found


def callbacks(
    given: list[Callback] | Callback | None,
    *,
    checkpointing: bool | None,
    default_checkpoint: bool,
    progress_bar: bool,
    model_summary: bool,
    max_time: timedelta | None,
) -> list[Callback]:
    """The user's callbacks with the default ones; checkpointers last."""
    found = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    for callback in found:
        if not hasattr(callback, "on_train_batch_end"):
            raise MisconfigurationException(f"callbacks: {callback!r} is not a Callback.")
    checkpointers = [c for c in found if isinstance(c, Checkpoint)]
    if checkpointing is False and checkpointers:
        raise MisconfigurationException(
            f"enable_checkpointing=False, but {type(checkpointers[0]).__name__} is among the callbacks. Remove one of"
            " the two."
        )
    if checkpointing is not False and default_checkpoint and not checkpointers:
        from milepost.callbacks.model_checkpoint import ModelCheckpoint

        found.append(ModelCheckpoint())
    if progress_bar and not any(hasattr(c, "get_metrics") for c in found):
        from milepost.callbacks.progress import RichProgressBar

        found.append(RichProgressBar())
    if max_time is not None:
        from milepost.callbacks.timer import Timer

        found.append(Timer(duration=max_time))
    if model_summary:
        from milepost.callbacks.model_summary import ModelSummary

        if not any(isinstance(c, ModelSummary) for c in found):
            found.append(ModelSummary())
    return _checkpointers_last(found)


def _checkpointers_last(found: list[Callback]) -> list[Callback]:
    return [c for c in found if not isinstance(c, Checkpoint)] + [c for c in found if isinstance(c, Checkpoint)]


def attach_module_callbacks(trainer: Trainer, model: Module) -> None:
    """Add what ``model.configure_callbacks`` returns; it replaces callbacks of the same type."""
    own = model.configure_callbacks() or []
    own = list(own) if isinstance(own, (list, tuple)) else [own]
    if not own:
        return
    types = {type(c) for c in own}
    trainer.callbacks = _checkpointers_last([c for c in trainer.callbacks if type(c) not in types] + own)


def checked_module(model: Any, previous: Any, fn: str) -> Module:
    """The module to run, taken out of ``torch.compile``'s wrapper."""
    if model is None:
        if previous is None:
            raise TypeError(f"`Trainer.{fn}()` needs a model: none was passed, and none was run before.")
        model = previous
    original = getattr(model, "_orig_mod", None)
    if original is not None:
        model = _compiled(model, original)
    if not isinstance(model, Module):
        raise TypeError(f"`Trainer.{fn}()` needs a milepost.Module, got {type(model).__name__}.")
    return model


def _compiled(wrapper: Any, original: Module) -> Module:
    """Train the original module, with forward and steps compiled: hooks, names and keys stay its own.

    A training step that optimizes by hand is left as it is; what it calls is compiled.
    """
    steps = ["validation_step", "test_step", "predict_step"]
    if original.automatic_optimization:
        steps.append("training_step")
    own = [name for name in steps if getattr(type(original), name) is not getattr(Module, name)]
    for name in ("forward", *own):
        if name not in vars(original):  # an earlier run has done so
            setattr(original, name, wrapper.dynamo_ctx(getattr(original, name)))
    if "log" not in vars(original):
        original.log = torch.compiler.disable(original.log)  # type: ignore[method-assign, no-untyped-call]
    return original


def checked_data(loaders: dict[str, Any], datamodule: Any) -> tuple[dict[str, Any], DataModule | None]:
    """A DataModule may stand in the place of loaders, but not beside them."""
    for name, value in loaders.items():
        if isinstance(value, DataModule):
            if datamodule is not None:
                raise MisconfigurationException("Two DataModules were given: one as loaders, one as `datamodule`.")
            datamodule, loaders = value, {**loaders, name: None}
    if datamodule is not None and any(v is not None for v in loaders.values()):
        raise MisconfigurationException("Both loaders and a `datamodule` were given: pass one of them.")
    return loaders, datamodule
