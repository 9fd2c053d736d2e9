"""The module that a Trainer trains: a torch Module that knows its steps, optimizers and data."""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from milepost import _distributed
from milepost.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from milepost.data.rng import isolated_rng
from milepost.errors import MisconfigurationException, ResumeError
from milepost.strategies.sharding import shard_like
from milepost.trainer.hparams import Hyperparameters
from milepost.trainer.metric_state import is_collection
from milepost.trainer.metrics import LogOptions
from milepost.trainer.rebuild import instantiate, on_the_class_only, read_hparams
from milepost.trainer.state import read_checkpoint, without_compile_prefix, without_compiled_part
from milepost.trainer.transfer import map_tensors, numbers_to_tensors

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

    from milepost.loggers.logger import Logger
    from milepost.trainer.trainer import Trainer

UNRECORDED = "unrecorded"
"""The hook that a step runs in whose values are not to be recorded."""


class Module(nn.Module, ModelHooks, DataHooks, CheckpointHooks, Hyperparameters):
    """Define `training_step` and `configure_optimizers`, hand it to ``Trainer.fit``.

    Also exported as ``LightningModule``; methods, hooks and attributes carry the names that Lightning users know.
    """

    example_input_array: Any = None
    """What `forward` takes, by which a logger draws the module."""

    CHECKPOINT_HYPER_PARAMS_KEY = "hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "hparams_type"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._trainer: Trainer | None = None
        self._automatic_optimization = True
        self._strict_loading: bool | None = None
        self._current_hook: str | None = None
        self._toggled: dict[nn.Parameter, bool] = {}
        self.allow_zero_length_dataloader_with_multiple_devices = False

    def _load_from_state_dict(self, *args: Any) -> None:
        # torch calls this in every load_state_dict, that of a module around this one too
        if self._trainer is not None:
            self._trainer.finish_staging()
        super()._load_from_state_dict(*args)

    # ---- what the run offers -------------------------------------------------------------------------------------

    @property
    def trainer(self) -> Trainer:
        """The Trainer that runs this module. Raises RuntimeError when there is none."""
        if self._trainer is None:
            raise RuntimeError(
                f"{type(self).__qualname__} is not attached to a `Trainer`: pass it to `trainer.fit` first."
            )
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self._trainer = trainer
        for child in self.children():
            if isinstance(child, Module):
                child.trainer = trainer

    @property
    def automatic_optimization(self) -> bool:
        """Whether the Trainer calls backward, step and zero_grad. Set False in ``__init__`` to do it yourself."""
        return self._automatic_optimization

    @automatic_optimization.setter
    def automatic_optimization(self, value: bool) -> None:
        self._automatic_optimization = value

    @property
    def strict_loading(self) -> bool:
        """Whether a checkpoint must hold exactly this module's keys."""
        return True if self._strict_loading is None else self._strict_loading

    @strict_loading.setter
    def strict_loading(self, value: bool) -> None:
        self._strict_loading = value

    @property
    def current_epoch(self) -> int:
        return self._trainer.current_epoch if self._trainer else 0

    @property
    def global_step(self) -> int:
        """Optimizer steps taken so far."""
        return self._trainer.global_step if self._trainer else 0

    @property
    def global_rank(self) -> int:
        return self._trainer.global_rank if self._trainer else 0

    @property
    def local_rank(self) -> int:
        return self._trainer.local_rank if self._trainer else 0

    @property
    def device(self) -> torch.device:
        """Device of the first parameter or buffer; the CPU where there is none."""
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first floating-point parameter; torch's default where there is none."""
        for tensor in self.parameters():
            if tensor.is_floating_point():
                return tensor.dtype
        return torch.get_default_dtype()

    @property
    def on_gpu(self) -> bool:
        """Whether the module is on a CUDA device."""
        return self.device.type == "cuda"

    @property
    def device_mesh(self) -> Any:
        """The mesh of a strategy that spreads the module over one, else None."""
        return getattr(self._trainer.strategy, "device_mesh", None) if self._trainer else None

    @property
    def logger(self) -> Logger | None:
        return self._trainer.logger if self._trainer else None

    @property
    def loggers(self) -> list[Logger]:
        return self._trainer.loggers if self._trainer else []

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank zero only."""
        if self.global_rank == 0:
            print(*args, **kwargs)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Gather `data`, a tensor or number or a nested collection of them, from all ranks. Call it on all of them.

        Each tensor comes back with a new first dimension, the rank; unchanged where there is a single one.

        Args:
            group: the ranks to gather from; all if None.
            sync_grads: let gradients flow back through it.
        """

        def gather(tensor: torch.Tensor) -> torch.Tensor:
            return _distributed.all_gather(tensor.to(self.device), group, sync_grads=sync_grads)

        return map_tensors(numbers_to_tensors(data), gather)

    # ---- export ----------------------------------------------------------------------------------------------------

    def to_onnx(self, file_path: Any = None, input_sample: Any = None, **kwargs: Any) -> Any:
        """Not there. Raises MisconfigurationException, which names what to call instead."""
        raise _exported_by_torch("to_onnx", "torch.onnx.export(module.eval(), (input_sample,), file_path)")

    def to_torchscript(
        self, file_path: Any = None, method: str | None = "script", example_inputs: Any = None, **kwargs: Any
    ) -> Any:
        """Not there. Raises MisconfigurationException, which names what to call instead."""
        raise _exported_by_torch("to_torchscript", "torch.export.export(module.eval(), (example_inputs,))")

    def to_tensorrt(self, file_path: Any = None, input_sample: Any = None, **kwargs: Any) -> Any:
        """Not there. Raises MisconfigurationException, which names what to call instead."""
        raise _exported_by_torch("to_tensorrt", "torch_tensorrt.compile(module.eval(), arg_inputs=[input_sample])")

    # ---- what the user defines -----------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss: a scalar tensor, a dict with the key ``loss``, or None to skip the batch."""
        raise MisconfigurationException(f"{type(self).__name__} has no `training_step`, which `Trainer.fit` needs.")

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """One batch of validation."""

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """One batch of testing."""

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """One batch of prediction; the module is called on it unless this is overridden."""
        return self(args[0] if args else next(iter(kwargs.values())))

    def configure_optimizers(self) -> Any:
        """Return an optimizer, a list of them, ``(optimizers, schedulers)``, a dict, or None."""
        raise MisconfigurationException(
            f"{type(self).__name__} has no `configure_optimizers`, which `Trainer.fit` needs. Return None from it to "
            "train without an optimizer."
        )

    def configure_callbacks(self) -> Any:
        """Callbacks that come with the module; one of the same type given to the Trainer is replaced."""
        return []

    # ---- logging -------------------------------------------------------------------------------------------------

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Record a metric: a number, a scalar tensor, or a torchmetrics Metric.

        Args:
            name: key in ``trainer.callback_metrics`` and for the loggers; ``_step`` and ``_epoch`` are appended when
                both are recorded.
            on_step: record this batch's value. Default: True in the training step.
            on_epoch: record the epoch's reduction. Default: True in validation and test.
            reduce_fx: ``"mean"`` (weighted by batch size), ``"sum"``, ``"min"`` or ``"max"``.
            sync_dist: reduce over all ranks, too: each step's value where `on_step`, the epoch's at its end. Log it on
                every rank then.
            sync_dist_group: the ranks to reduce over; all if None.
            batch_size: weight of the mean; read off the batch where it is not given.
            rank_zero_only: it is logged on rank 0 alone, and not reduced over ranks.
        """
        hook = self._current_hook
        if self._trainer is None or hook == UNRECORDED or (hook is None and self._trainer.state.status != "running"):
            return  # not in a run: a step called by hand from a test or a notebook logs nothing
        if hook is None:
            raise MisconfigurationException(
                f"self.log({name!r}, ...) outside of a step or an epoch hook: values cannot be logged there."
            )
        if self._trainer.barebones:
            self._trainer.warn_once("self.log does nothing under Trainer(barebones=True), which measures raw speed.")
            return
        options = LogOptions(
            on_step,
            on_epoch,
            prog_bar,
            True if logger is None else logger,
            reduce_fx,
            enable_graph,
            add_dataloader_idx,
            metric_attribute,
            sync_dist and not rank_zero_only,
            sync_dist_group,
        )
        self._trainer.metrics.record(hook, name, value, options, batch_size, self)

    def log_dict(self, dictionary: Mapping[str, Any] | MetricCollection, **options: Any) -> None:
        """`log` each item of `dictionary` (a torchmetrics MetricCollection too) with the same `options`."""
        items: Any = dictionary.items()
        if is_collection(dictionary):
            items = dictionary.items(keep_base=False, copy_state=not dictionary._enable_compute_groups)
        for name, value in items:
            self.log(name, value, **options)

    # ---- optimization --------------------------------------------------------------------------------------------

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizer, or the list of them; steps taken through them count as ``global_step``."""
        steppers = self.trainer.optimization.steppers if use_pl_optimizer else self.trainer.optimizers
        return steppers[0] if len(steppers) == 1 else list(steppers)

    def lr_schedulers(self) -> Any:
        """None, the scheduler, or the list of them."""
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return None if not schedulers else schedulers[0] if len(schedulers) == 1 else schedulers

    def manual_backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """``loss.backward()`` with the precision's scaling and the hooks around it."""
        if self.automatic_optimization:
            raise MisconfigurationException(
                "manual_backward is for manual optimization: set `self.automatic_optimization = False` in __init__."
            )
        self.trainer.optimization.backward(loss, *args, **kwargs)

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Override to change how gradients are computed."""
        self.trainer.strategy.run_backward(loss, *args, **kwargs)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Optimizer, optimizer_closure: Any = None) -> None:
        """Override to change when the optimizer steps; call ``optimizer.step(closure=optimizer_closure)`` inside."""
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Override to change how gradients are cleared."""
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Override for schedulers whose ``step`` takes something of its own."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Override to clip differently; the default clips as the Trainer was told."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of `optimizer`'s parameters, by ``"norm"`` (default) or ``"value"``.

        What is not given is the Trainer's.

        Raises:
            MisconfigurationException: the Trainer was given another value or algorithm; an unknown algorithm.
        """
        trainer = self.trainer
        given = {"gradient_clip_val": gradient_clip_val, "gradient_clip_algorithm": gradient_clip_algorithm}
        for name, value in given.items():
            default = getattr(trainer, name)
            if value is not None and default is not None and value != default:
                raise MisconfigurationException(
                    f"clip_gradients({name}={value!r}), but Trainer({name}={default!r}): give one of the two."
                )
        limit = trainer.gradient_clip_val if gradient_clip_val is None else gradient_clip_val
        algorithm = gradient_clip_algorithm or trainer.gradient_clip_algorithm or "norm"
        if algorithm not in ("norm", "value"):
            raise MisconfigurationException(f"gradient_clip_algorithm={algorithm!r}: use 'norm' or 'value'.")
        if limit:
            trainer.precision_plugin.clip_gradients(optimizer, limit, algorithm)

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer) -> Iterator[None]:
        """Only `optimizer`'s parameters require gradients inside."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def toggle_optimizer(self, optimizer: Optimizer) -> None:
        """Freeze the parameters of every other optimizer, until `untoggle_optimizer`."""
        mine = {p for group in optimizer.param_groups for p in group["params"]}
        for other in self.trainer.optimizers:
            for parameter in (p for group in other.param_groups for p in group["params"]):
                if parameter not in mine and parameter not in self._toggled:
                    self._toggled[parameter] = parameter.requires_grad
                    parameter.requires_grad = False

    def untoggle_optimizer(self, optimizer: Optimizer) -> None:
        """Undo `toggle_optimizer`."""
        for parameter, required in self._toggled.items():
            parameter.requires_grad = required
        self._toggled = {}

    def freeze(self) -> None:
        """Stop training every parameter, and put the module in eval mode."""
        self.requires_grad_(False)
        self.eval()

    def unfreeze(self) -> None:
        """Train every parameter again."""
        self.requires_grad_(True)
        self.train()

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    @on_the_class_only
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build the module from the hyper-parameters in a checkpoint and load its weights.

        The caller's random state is left alone.

        Args:
            checkpoint_path: a file written by Milepost or by Lightning, or a directory of `SnapshotCheckpointIO`.
            map_location: where tensors go, and the module with them; the CPU by default.
            hparams_file: hyper-parameters that take the place of the checkpoint's: ``.yaml`` or ``.csv``, as a logger
                wrote it.
            strict: whether keys must match exactly; the module's ``strict_loading`` by default.
            weights_only: False loads pickled objects too, which runs code of the file: only for files that you trust.
            kwargs: constructor arguments that override saved hyper-parameters. Saved ones that the constructor does
                not take are dropped.

        Raises:
            TypeError: it was called on an instance, or an argument is neither saved nor given.
            MisconfigurationException: `strict` contradicts what the module has set.
            CheckpointNotFoundError, CheckpointCorruptError, UnsafeCheckpointError: the file is missing, damaged or
                unsafe.
            ResumeError: keys of the checkpoint and of the module differ, and `strict` holds.
        """
        checkpoint = read_checkpoint(checkpoint_path, map_location, weights_only)
        if hparams_file is not None:
            checkpoint["hyper_parameters"] = read_hparams(hparams_file)
        with isolated_rng():
            model = instantiate(cls, checkpoint, kwargs)
            if strict is not None and model._strict_loading not in (None, strict):
                raise MisconfigurationException(
                    f"strict={strict} was given to load_from_checkpoint, but the module has set strict_loading ="
                    f" {model._strict_loading}. Leave one of them out."
                )
            model.configure_model()
            model.on_load_checkpoint(checkpoint)
        load_weights(model, checkpoint, strict=model.strict_loading if strict is None else strict)
        tensors = (value for value in checkpoint["state_dict"].values() if isinstance(value, torch.Tensor))
        return model.to(next(tensors, torch.empty(0)).device)


def _exported_by_torch(method: str, call: str) -> MisconfigurationException:
    return MisconfigurationException(f"{method} is not there: a Module is a torch Module, so call {call}.")


def load_weights(model: nn.Module, checkpoint: Mapping[str, Any], *, strict: bool) -> None:
    """Load ``checkpoint["state_dict"]`` into `model`; keys that torch.compile prefixed are understood.

    Without `strict`, keys that only one side has are left alone, with a warning.

    Raises:
        ResumeError: keys or shapes differ and `strict` holds.
    """
    if "state_dict" not in checkpoint:
        raise ResumeError(f"The checkpoint holds no `state_dict`; its keys are {sorted(map(str, checkpoint))}.")
    given, own = without_compile_prefix(checkpoint["state_dict"]), model.state_dict()
    names = {without_compiled_part(key): key for key in own}
    state = OrderedDict((names.get(k, k), v) for k, v in given.items())
    for key, value in state.items():
        if key in own and isinstance(value, torch.Tensor):
            state[key] = shard_like(own[key], value)
    if versions := getattr(given, "_metadata", None):
        paths = [(path, without_compiled_part(path)) for path in getattr(own, "_metadata", ())]
        state._metadata = {path: versions[plain] for path, plain in paths if plain in versions}  # type: ignore[attr-defined]
    try:
        unmatched = model.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        raise ResumeError(
            f"The checkpoint does not fit {type(model).__name__}: {error}\nIf the difference is meant, pass"
            " strict=False to load_from_checkpoint, or set `strict_loading = False` on the module."
        ) from error
    for keys, where in ((unmatched.missing_keys, "module"), (unmatched.unexpected_keys, "checkpoint")):
        if keys:
            warnings.warn(f"strict=False: only the {where} has {keys}; they are left alone.", UserWarning, stacklevel=3)


def is_overridden(method: str, instance: object, base: type) -> bool:
    """Whether `instance` brings its own `method`, rather than `base`'s."""
    own = getattr(instance, method, None)
    return own is not None and getattr(own, "__func__", own) is not getattr(base, method, None)


def takes_argument(function: Any, name: str, minimum: int) -> bool:
    """Whether `function` takes a parameter called `name`, or at least `minimum` positional ones, or ``*args``."""
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return (
        any(p.name == name for p in parameters)
        or any(p.kind is p.VAR_POSITIONAL for p in parameters)
        or len(positional) >= minimum
    )


def refuse_iterator(step: Any, name: str) -> None:
    """A step that asks for the iterator itself would read data that no checkpoint knows of.

    Raises:
        MisconfigurationException: it does.
    """
    if "dataloader_iter" in inspect.signature(step).parameters:
        raise MisconfigurationException(
            f"{name}(dataloader_iter): steps take a batch here, so that a resumed run knows what was read. Take a"
            " `batch`, and read several at once with a larger batch size or a CombinedLoader."
        )


LightningModule = Module
__all__ = ["LightningModule", "Module", "is_overridden", "load_weights", "refuse_iterator", "takes_argument"]
