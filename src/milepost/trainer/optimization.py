"""Optimizers and schedulers: taking in what `configure_optimizers` returns, and making one step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from milepost.core.schedules import SchedulerConfig
from milepost.errors import MisconfigurationException
from milepost.trainer.progress import FitProgress

if TYPE_CHECKING:
    from milepost.trainer.module import Module
    from milepost.trainer.trainer import Trainer


class Reached(Enum):
    """How far the optimization of the present batch has come."""

    NOTHING = 0
    FORWARD = 1
    BACKWARD = 2
    STEP = 3


def parse_optimizers(returned: Any) -> tuple[list[Optimizer], list[SchedulerConfig]]:
    """Read any of the forms that `configure_optimizers` may return.

    Raises:
        MisconfigurationException: another form, an unknown key, or a plateau scheduler without a monitor.
    """
    if returned is None:
        return [], []
    if isinstance(returned, Optimizer):
        return [returned], []
    if isinstance(returned, Mapping):
        return _from_mappings([returned])
    if isinstance(returned, (list, tuple)):
        if (
            len(returned) == 2
            and isinstance(returned[0], (list, tuple))
            and all(isinstance(o, Optimizer) for o in returned[0])
        ):
            schedulers = returned[1] if isinstance(returned[1], (list, tuple)) else [returned[1]]
            return list(returned[0]), [_scheduler(s) for s in schedulers if s is not None]
        if all(isinstance(o, Optimizer) for o in returned):
            return list(returned), []
        if all(isinstance(o, Mapping) for o in returned):
            return _from_mappings(list(returned))
    raise MisconfigurationException(
        f"configure_optimizers returned {type(returned).__name__}: {returned!r}. Return an optimizer, a list of them, "
        "(optimizers, schedulers), a dict with the keys optimizer and lr_scheduler, or None."
    )


def _from_mappings(items: list[Mapping[str, Any]]) -> tuple[list[Optimizer], list[SchedulerConfig]]:
    configs = []
    for item in items:
        _warn_of(set(item) - {"optimizer", "lr_scheduler", "monitor", "frequency"}, "optimizer, lr_scheduler, monitor")
        if (given := item.get("lr_scheduler")) is not None:
            configs.append(_scheduler(given, monitor=item.get("monitor")))
    return [item["optimizer"] for item in items], configs


def _scheduler(given: Any, monitor: str | None = None) -> SchedulerConfig:
    options = dict(given) if isinstance(given, Mapping) else {"scheduler": given}
    known = list(SchedulerConfig.__dataclass_fields__)
    if "scheduler" not in options:
        raise MisconfigurationException(f"lr_scheduler={options!r} needs the key 'scheduler'; it may have {known}.")
    _warn_of(set(options) - set(known), ", ".join(known))
    config = SchedulerConfig(**{"monitor": monitor, **{key: options[key] for key in options if key in known}})
    config.reduce_on_plateau = config.reduce_on_plateau or isinstance(config.scheduler, ReduceLROnPlateau)
    if config.interval not in ("step", "epoch"):
        raise MisconfigurationException(f"lr_scheduler interval={config.interval!r}: use 'step' or 'epoch'.")
    if not isinstance(config.scheduler, LRScheduler) and not hasattr(config.scheduler, "step"):
        raise MisconfigurationException(f"lr_scheduler={config.scheduler!r} has no method `step`.")
    return config


def _warn_of(unknown: set[Any], known: str) -> None:
    if unknown:
        warnings.warn(
            f"configure_optimizers returned a dict with the key {sorted(map(str, unknown))[0]!r}, which means nothing"
            f" there. Its keys may be {known}.",
            stacklevel=2,
        )


def require_attached(optimizers: list[Optimizer], configs: list[SchedulerConfig]) -> None:
    """A scheduler of an optimizer that is not trained with would move nothing.

    Raises:
        MisconfigurationException: there is one.
    """
    for config in configs:
        optimizer = getattr(config.scheduler, "optimizer", None)
        if optimizer is not None and all(getattr(o, "optimizer", o) is not optimizer for o in optimizers):
            raise MisconfigurationException(
                f"{type(config.scheduler).__name__} moves an optimizer that configure_optimizers did not return. Build"
                " it on one that is returned."
            )


def require_monitors(configs: list[SchedulerConfig]) -> None:
    """Automatic optimization steps the schedulers itself, so a plateau must name its metric.

    Raises:
        MisconfigurationException: one does not.
    """
    if any(config.reduce_on_plateau and config.monitor is None for config in configs):
        raise MisconfigurationException(
            "ReduceLROnPlateau needs a metric: give the lr_scheduler dict the key 'monitor'."
        )


class Stepper:
    """What ``self.optimizers()`` and the hook `optimizer_step` give the user: an optimizer whose steps are counted."""

    def __init__(self, optimizer: Optimizer, module: Module, step: Callable[..., Any]) -> None:
        self.optimizer = optimizer
        self._module = module
        self._step = step

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        """The optimizer's: ``isinstance(self.optimizers(), torch.optim.SGD)`` holds."""
        return type(self.optimizer)

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        """Step through the precision plugin; counts as one ``global_step``. `kwargs` go to the optimizer's `step`.

        Raises:
            MisconfigurationException: `closure` cannot be called.
        """
        if closure is not None and not callable(closure):
            raise MisconfigurationException(f"optimizer.step(closure={closure!r}): give a function, or leave it out.")
        return self._step(self.optimizer, closure, **kwargs)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Only this optimizer's parameters require gradients inside. `sync_grad` matters to several ranks only."""
        with self._module.toggled_optimizer(self.optimizer):
            yield

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


class Optimization:
    """Runs one batch's optimization for the fit loop."""

    def __init__(self, trainer: Trainer, progress: FitProgress) -> None:
        self._trainer = trainer
        self._progress = progress
        self.steppers: list[Stepper] = []
        self.reached = Reached.NOTHING
        self._last_output: Any = None

    def attach(self, optimizers: list[Optimizer]) -> None:
        module = self._trainer.lightning_module
        step = self._precise_step if module.automatic_optimization else self._manual_step
        self.steppers = [Stepper(optimizer, module, step) for optimizer in optimizers]

    def run_batch(self, batch: Any, batch_idx: int, accumulating: bool) -> Any:
        """Run the training step and what follows from it. Returns what the batch-end hooks get as ``outputs``."""
        trainer = self._trainer
        module = trainer.lightning_module
        if not module.automatic_optimization:
            return _manual_output(self._training_step(batch, batch_idx))
        closure = self._closure(batch, batch_idx, accumulating)
        if accumulating:
            with trainer.strategy.without_gradient_sync():
                closure()
        elif not self.steppers:  # counted all the same: `max_steps` and the checkpoints' triggers go by it
            self._progress.optimizer_step.add("ready")
            closure()
            self._progress.optimizer_step.add("completed")
        else:
            self._progress.optimizer_step.add("ready")
            with trainer.in_hook("optimizer_step"), trainer.profile("optimizer_step", module):
                module.optimizer_step(trainer.current_epoch, batch_idx, self.steppers[0], closure)
            if self._last_output is _NOT_RUN:
                raise MisconfigurationException(
                    f"{type(module).__name__}.optimizer_step did not run the closure: call "
                    "optimizer.step(closure=optimizer_closure), or optimizer_closure() yourself."
                )
            self._progress.optimizer_step.add("completed")
        output, self._last_output = self._last_output, None
        return output

    def _training_step(self, batch: Any, batch_idx: int) -> Any:
        trainer = self._trainer
        self.reached = Reached.FORWARD
        with (
            trainer.precision_plugin.forward_context(),
            trainer.in_hook("training_step"),
            trainer.profile("training_step", trainer.strategy),
        ):
            if not trainer.lightning_module.automatic_optimization:
                return trainer.call_step("training_step", batch, batch_idx)
            return trainer.strategy.run_training_step(trainer.training_call, batch, batch_idx)

    def _closure(self, batch: Any, batch_idx: int, accumulating: bool) -> Callable[[], Any]:
        self._last_output = _NOT_RUN
        first = batch_idx % self._trainer.accumulate_grad_batches == 0

        @torch.enable_grad()
        def closure() -> torch.Tensor | None:
            output = self._training_step(batch, batch_idx)
            loss = _loss_of(output)
            if first:
                self._zero_grad(batch_idx)  # also where the batch is skipped: the step must not repeat the last one's
            if loss is None:
                self._last_output = {}
                return None
            loss = loss / self._trainer.accumulate_grad_batches
            reported = loss.detach().clone()
            self._last_output = {**(_detached(output) if isinstance(output, Mapping) else {}), "loss": reported}
            self.backward(loss)
            return reported

        return closure

    def _zero_grad(self, batch_idx: int) -> None:
        trainer = self._trainer
        for stepper in self.steppers:
            self._progress.zero_grad.add("ready")
            trainer.call("on_before_zero_grad", stepper.optimizer)
            self._progress.zero_grad.add("started")
            module = trainer.lightning_module
            with trainer.in_hook("optimizer_zero_grad"), trainer.profile("optimizer_zero_grad", module):
                module.optimizer_zero_grad(trainer.current_epoch, batch_idx, stepper.optimizer)
            self._progress.zero_grad.add("completed")

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        self.reached = Reached.BACKWARD
        scaled = trainer.precision_plugin.scale(loss)
        trainer.call("on_before_backward", scaled)
        with trainer.in_hook("backward"), trainer.profile("backward", trainer.strategy):
            trainer.lightning_module.backward(scaled, *args, **kwargs)
        trainer.strategy.backward_done()
        trainer.call("on_after_backward")

    def _manual_step(self, optimizer: Optimizer, closure: Any, **kwargs: Any) -> Any:
        self._progress.manual_step.add("ready")
        result = self._precise_step(optimizer, closure, clip=False, **kwargs)
        self._progress.manual_step.add("completed")
        return result

    def _precise_step(self, optimizer: Optimizer, closure: Any, clip: bool = True, **kwargs: Any) -> Any:
        trainer = self._trainer

        def before_step() -> None:
            trainer.call("on_before_optimizer_step", optimizer)
            if clip:
                hook, module = "configure_gradient_clipping", trainer.lightning_module
                with trainer.in_hook(hook), trainer.profile(hook, module):
                    module.configure_gradient_clipping(
                        optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
                    )
            self.reached = Reached.STEP

        return trainer.precision_plugin.step(optimizer, closure or (lambda: None), before_step, **kwargs)

    def step_schedulers(self, interval: str, *, plateau: bool, index: int) -> None:
        """Move the schedulers that are due at `index` (counted from 1) of `interval`."""
        trainer = self._trainer
        if not trainer.lightning_module.automatic_optimization:
            return
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau != plateau or config.interval != interval or index % config.frequency:
                continue
            metric = None
            if plateau:
                metric = trainer.callback_metrics.get(config.monitor or "")
                metric = trainer.strategy.broadcast(metric)  # a rate of its own would part a rank's model from the rest
                if metric is None:
                    message = (
                        f"ReduceLROnPlateau monitors {config.monitor!r}, which was not logged. "
                        f"Logged so far: {sorted(trainer.callback_metrics)}."
                    )
                    if config.strict and not trainer.fit_loop.metrics_lost:
                        raise MisconfigurationException(
                            message + " Log it, or set 'strict': False in the lr_scheduler dict."
                        )
                    trainer.warn_once(message + " The learning rate is left as it is.")
                    continue
            self._progress.scheduler.add("ready")
            with trainer.in_hook("lr_scheduler_step"):
                module = trainer.lightning_module
            with trainer.profile("lr_scheduler_step", module):
                module.lr_scheduler_step(config.scheduler, metric)
            self._progress.scheduler.add("completed")


_NOT_RUN = object()


def _loss_of(output: Any) -> torch.Tensor | None:
    if output is None or isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping) and "loss" in output:
        loss: torch.Tensor = output["loss"]
        return loss
    raise MisconfigurationException(
        f"training_step returned {type(output).__name__}: in automatic optimization return the loss tensor, a dict with"
        " the key 'loss', or None to skip the batch."
    )


def _manual_output(output: Any) -> dict[str, Any]:
    if output is None:
        return {}
    if isinstance(output, torch.Tensor):
        return {"loss": output.detach()}
    if isinstance(output, Mapping):
        return _detached(output)
    raise MisconfigurationException(
        f"training_step returned {type(output).__name__}: in manual optimization return a tensor, a dict or nothing."
    )


def _detached(output: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in output.items()}
