"""What ``self.log`` records: values of a step, and reductions over an epoch that a resumed run continues."""

from __future__ import annotations

import copy
import numbers
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from milepost import _distributed
from milepost.errors import MisconfigurationException
from milepost.trainer.metric_state import is_metric, metric_paths, metrics_by_path
from milepost.trainer.transfer import map_tensors

if TYPE_CHECKING:
    from torchmetrics import Metric

_STEP_HOOKS = frozenset(
    {
        "training_step", "on_train_batch_start", "on_train_batch_end", "on_before_backward", "backward",
        "on_after_backward", "on_before_optimizer_step", "optimizer_step", "configure_gradient_clipping",
        "on_before_zero_grad", "optimizer_zero_grad",
    }
)  # fmt: skip
_EVALUATION_HOOKS = frozenset(
    name
    for stage in ("validation", "test")
    for name in (f"{stage}_step", f"on_{stage}_batch_start", f"on_{stage}_batch_end")
)
_EPOCH_HOOKS = frozenset(
    name
    for stage in ("train", "validation", "test")
    for name in (f"on_{stage}_start", f"on_{stage}_epoch_start", f"on_{stage}_epoch_end")
)
_REDUCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}
_REDUCTION_NAMES = {
    torch.mean: "mean", torch.sum: "sum", torch.min: "min", torch.max: "max", sum: "sum", min: "min", max: "max",
    "mean": "mean", "avg": "mean", "sum": "sum", "min": "min", "max": "max",
}  # fmt: skip


@dataclass(slots=True)
class LogOptions:
    """How one value is recorded: the arguments of ``self.log`` that belong to the key."""

    on_step: bool | None = None
    on_epoch: bool | None = None
    prog_bar: bool = False
    logger: bool = True
    reduce_fx: Any = "mean"
    enable_graph: bool = False
    add_dataloader_idx: bool = True
    metric_attribute: str | None = None
    sync: bool = False  # reduce over ranks
    group: Any = None  # the ranks to reduce over


@dataclass(slots=True)
class _Entry:
    """One key of the running epoch, as logged in one hook for one loader."""

    name: str
    suffix: str  # tells the loaders of an evaluation apart
    loader: int | None
    on_step: bool
    on_epoch: bool
    prog_bar: bool
    logger: bool
    reduction: str
    options: LogOptions | None = None
    value: torch.Tensor | None = None  # of the last step
    total: torch.Tensor | None = None  # running reduction
    weight: int = 0
    metric: Metric | None = None
    step: int = 0  # global_step when it was logged last
    sync: bool = False  # its values are those of all ranks
    agreed: torch.Tensor | None = None  # with others, the epoch's value, once it was agreed on

    def add(self, value: torch.Tensor, batch_size: Callable[[], int]) -> None:
        shared = self.sync and self.on_step
        self.value = _distributed.reduced(value, self.reduction, self._group) if shared else value
        if not self.on_epoch:
            return
        if self.reduction == "mean":
            size = batch_size()
            self.total = value * size if self.total is None else self.total + value * size
            self.weight += size
        else:
            self.total = value if self.total is None else _REDUCTIONS[self.reduction](self.total, value)

    def shown_value(self, in_batch: bool) -> torch.Tensor | None:
        """The value of the step, or the epoch's so far; None where that is not recorded."""
        if in_batch:
            return self.value if self.on_step else None
        if not self.on_epoch:
            return None
        if self.with_others:
            return self.agreed
        return self._computed()

    @property
    def with_others(self) -> bool:
        """Whether the epoch's value takes all ranks to compute: then that is done where all of them come by."""
        return (self.sync or self.metric is not None) and _distributed.world_size() > 1

    @property
    def _group(self) -> Any:
        return None if self.options is None else self.options.group

    def agree(self) -> None:
        """Compute the epoch's value with the other ranks, where it takes them."""
        if not (self.on_epoch and self.with_others):
            return
        if self.metric is not None:
            self.agreed = self._computed()  # it meets the other ranks by itself
            return
        mean = self.reduction == "mean"
        total = torch.zeros(()) if self.total is None else self.total
        total = _distributed.reduced(total, "sum" if mean else self.reduction, self._group)
        if mean:
            weight = torch.tensor(float(self.weight), dtype=total.dtype, device=total.device)
            total = total / _distributed.reduced(weight, "sum", self._group)
        self.agreed = total

    def _computed(self) -> torch.Tensor | None:
        """The epoch's value, as this rank has it."""
        if self.metric is not None:
            computed = self.metric.compute()
            if not isinstance(computed, torch.Tensor):
                raise ValueError(
                    f"self.log({self.name!r}, ...): {type(self.metric).__name__}.compute() returned {computed!r}, which"
                    " is no tensor. Log its parts one by one."
                )
            return computed.detach()
        if self.total is None:
            return None
        return self.total / self.weight if self.reduction == "mean" else self.total

    def shown_name(self, in_batch: bool) -> str:
        forked = self.on_step and self.on_epoch
        return self.name + (("_step" if in_batch else "_epoch") if forked else "") + self.suffix


class EpochMetrics:
    """The entries of one training or evaluation epoch."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str, str], _Entry] = {}
        self.in_batch = False  # whether the present values are those of a step
        self.loader: int | None = None  # of the running evaluation, where there are several

    def shown(self, in_batch: bool) -> Iterator[tuple[_Entry, str, torch.Tensor]]:
        """Entry, name and value of all that is to be seen now."""
        for entry in self.entries.values():
            if entry.loader == self.loader and (value := entry.shown_value(in_batch)) is not None:
                yield entry, entry.shown_name(in_batch), value

    def state_dict(self, paths: dict[int, str]) -> list[dict[str, Any]]:
        """The running reductions, as plain values and tensors.

        Args:
            paths: where each metric object stands in the module, by id: there it is found again.
        """
        return [
            {
                "hook": hook, "key": e.name, "on_step": e.on_step, "on_epoch": e.on_epoch, "prog_bar": e.prog_bar,
                "logger": e.logger, "reduction": e.reduction, "total": _detached(e.total), "weight": e.weight,
                "value": _detached(e.value), "step": e.step, "metric": e.metric and paths.get(id(e.metric)),
                **({"sync": e.sync, "agreed": _detached(e.agreed)} if e.sync or e.with_others else {}),
            }
            for (hook, _, _), e in self.entries.items()
            if e.metric is None or id(e.metric) in paths
        ]  # fmt: skip

    def load_state_dict(self, state: list[dict[str, Any]], module: torch.nn.Module) -> None:
        """Put back what `state_dict` returned; what the metric objects in `module` hold is put back elsewhere."""
        metrics = metrics_by_path(module)
        for item in state:
            fields = dict(item)
            hook, name = fields.pop("hook"), fields.pop("key")
            fields["metric"] = metrics.get(fields["metric"] or "")
            for key in ("total", "value", "agreed"):
                fields[key] = _on(module, fields.get(key))
            self.entries[(hook, name, "")] = _Entry(name=name, suffix="", loader=None, **fields)


class Metrics:
    """The three views that users read, and the epochs that feed them.

    The views are brought up to date when they are read: inside a batch with the values of that step, elsewhere with
    those of the epoch so far. What an earlier epoch left in them stays until it is logged again.
    """

    def __init__(self, step: Callable[[], int]) -> None:
        self._step = step
        self._callback: dict[str, torch.Tensor] = {}
        self._logged: dict[str, torch.Tensor] = {}
        self._progress_bar: dict[str, float] = {}
        self._steps: dict[str, int] = {}
        self.training = EpochMetrics()
        self.current: EpochMetrics = self.training
        self._stale = False
        self._batch: Any = None
        self._batch_size: int | None = None
        self._unsaved: set[str] = set()  # keys of metric objects that no checkpoint can hold, once told

    # ---- the views -----------------------------------------------------------------------------------------------

    @property
    def callback(self) -> dict[str, torch.Tensor]:
        self._refresh()
        return self._callback

    @property
    def logged(self) -> dict[str, torch.Tensor]:
        self._refresh()
        return self._logged

    @property
    def progress_bar(self) -> dict[str, float]:
        self._refresh()
        return self._progress_bar

    @property
    def steps(self) -> dict[str, int]:
        """For each key of `callback`, the ``global_step`` at which it was last logged."""
        self._refresh()
        return self._steps

    def _refresh(self) -> None:
        if not self._stale:
            return
        self._stale = False
        epoch = self.current
        for entry, name, value in epoch.shown(epoch.in_batch):
            if entry.logger:
                self._logged[name] = value
            if epoch is self.training or not epoch.in_batch:
                step = entry.step if epoch.in_batch else self._step()
                for key in (entry.name + entry.suffix, name):
                    self._callback[key], self._steps[key] = value, step
            if entry.prog_bar:
                self._progress_bar[name] = float(value)

    def clear(self) -> None:
        """Forget what an earlier run, or a sanity check, has shown."""
        for view in (self._callback, self._logged, self._progress_bar, self._steps):
            view.clear()
        self._stale = False

    # ---- the course of a run -------------------------------------------------------------------------------------

    def begin_training_epoch(self) -> None:
        self._refresh()
        self.training = self.current = EpochMetrics()

    def begin_evaluation(self) -> EpochMetrics:
        """Start the epoch of an evaluation. Returns the one that it interrupts, for `end_evaluation`."""
        self._refresh()
        interrupted, self.current = self.current, EpochMetrics()
        return interrupted

    def end_evaluation(self, interrupted: EpochMetrics) -> None:
        self._refresh()
        self._reset_metric_objects()
        self.current = interrupted

    def begin_batch(self, batch: Any, loader: int | None = None) -> None:
        self._batch, self._batch_size = batch, None
        self.current.in_batch, self.current.loader = True, loader

    def end_batch(self) -> None:
        """The batch is not needed any more."""
        self._batch, self._batch_size = None, None

    def end_loader(self, loader: int | None = None) -> dict[str, torch.Tensor]:
        """Go from steps to the epoch, for the loader just read. Returns the values for loggers and results.

        `loader` is the one that the views are about from now on.
        """
        self.end_steps()
        values = self.epoch_values()
        self._refresh()
        self.current.loader = loader
        return values

    def end_steps(self) -> None:
        """From now on the views show the values of the epoch."""
        self._refresh()
        for entry in self.current.entries.values():
            if entry.loader == self.current.loader:
                entry.agree()
        self.current.in_batch = False
        self._stale = True

    def end_training_epoch(self) -> None:
        """All was reported: the next epoch starts from nothing."""
        self._refresh()
        self._reset_metric_objects()
        self.training = self.current = EpochMetrics()

    def step_values(self) -> dict[str, torch.Tensor]:
        """What the loggers get for the batch just run: the last step's value of every key, also if older than that."""
        return {name: value for entry, name, value in self.current.shown(in_batch=True) if entry.logger}

    def epoch_values(self) -> dict[str, torch.Tensor]:
        """What the loggers get for the epoch."""
        return {name: value for entry, name, value in self.current.shown(in_batch=False) if entry.logger}

    def _reset_metric_objects(self) -> None:
        for entry in self.current.entries.values():
            if entry.metric is not None:
                entry.metric.reset()

    def of_training_step(self, key: str) -> bool:
        """Whether `key` shows a value that the training step logs for each step."""
        return any(
            entry.on_step and key in (entry.name, entry.shown_name(in_batch=True))
            for entry in self.training.entries.values()
        )

    # ---- one call of self.log ------------------------------------------------------------------------------------

    def record(
        self, hook: str, name: str, value: Any, options: LogOptions, batch_size: int | None, module: torch.nn.Module
    ) -> None:
        """Take one ``self.log`` call of `module` made inside `hook`."""
        loader = self.current.loader
        suffix = f"/dataloader_idx_{loader}" if options.add_dataloader_idx and loader is not None else ""
        entry = self.current.entries.get((hook, name, suffix))
        if entry is None:
            entry = self.current.entries[(hook, name, suffix)] = _new_entry(hook, name, suffix, loader, options)
        elif (entry.options is not None and entry.options != options) or entry.loader != loader:
            raise MisconfigurationException(
                f"self.log({name!r}, ...) was called twice in `{hook}` with different arguments, or for two loaders"
                " with add_dataloader_idx=False: give each its own name."
            )
        entry.options, entry.sync = options, options.sync
        if is_metric(value):
            entry.metric = value
            last = getattr(value, "_forward_cache", None)
            entry.value = last.detach() if isinstance(last, torch.Tensor) else None
        else:
            size: Callable[[], int] = (lambda: batch_size) if batch_size is not None else self._size_of_batch
            entry.add(_scalar(name, value, options.enable_graph), size)
        entry.step = self._step()
        if not self.current.in_batch:
            entry.agree()
        self._stale = True

    def _size_of_batch(self) -> int:
        if self._batch_size is None:
            self._batch_size = _first_length(self._batch)
        return self._batch_size

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def mark(self) -> Metrics:
        """A copy of the present state, cheap: values are replaced and never written to."""
        marked = copy.copy(self)
        for view in ("_callback", "_logged", "_progress_bar", "_steps"):
            setattr(marked, view, dict(getattr(self, view)))
        marked.training = copy.copy(self.training)
        marked.training.entries = {key: copy.copy(entry) for key, entry in self.training.entries.items()}
        marked.current = marked.training
        return marked

    def evaluated_objects(self) -> set[int]:
        """Ids of the metric objects of an evaluation that is under way: they are reset at its end."""
        return set() if self.current is self.training else {id(e.metric) for e in self.current.entries.values()}

    def state_dict(self, module: torch.nn.Module) -> dict[str, Any]:
        """All but what metric objects in `module` hold themselves, as plain values and tensors."""
        paths = metric_paths(module)
        for entry in self.training.entries.values():
            if entry.metric is not None and id(entry.metric) not in paths and entry.name not in self._unsaved:
                self._unsaved.add(entry.name)
                warnings.warn(
                    f"The metric logged as {entry.name!r} is no attribute of {type(module).__name__}, so what it has"
                    " accumulated is not in the checkpoint. Assign it to `self` in __init__.",
                    stacklevel=2,
                )
        return {
            "epoch": self.training.state_dict(paths),
            "in_batch": self.training.in_batch,
            "callback": dict(self.callback),
            "logged": dict(self.logged),
            "progress_bar": dict(self.progress_bar),
            "steps": dict(self.steps),
        }

    def recall(self, values: dict[str, torch.Tensor]) -> None:
        """Show `values` to callbacks and schedulers, as logged now."""
        for name, value in values.items():
            self._callback[name], self._steps[name] = value, self._step()

    def load_state_dict(self, state: dict[str, Any], module: torch.nn.Module) -> None:
        """Go on with the epoch of `state`; `module` holds the torchmetrics objects."""
        self.training = self.current = EpochMetrics()
        self.training.load_state_dict(state["epoch"], module)
        self.training.in_batch = bool(state.get("in_batch", False))
        self._callback.update(state["callback"])
        self._logged.update(state.get("logged", {}))
        self._progress_bar.update(state["progress_bar"])
        self._steps.update(state["steps"])


def _new_entry(hook: str, name: str, suffix: str, loader: int | None, options: LogOptions) -> _Entry:
    per_step = hook in _STEP_HOOKS
    if not (per_step or hook in _EVALUATION_HOOKS or hook in _EPOCH_HOOKS):
        raise MisconfigurationException(
            f"self.log({name!r}, ...) inside `{hook}`: values cannot be logged there. Log in a step or an epoch hook."
        )
    if options.add_dataloader_idx and "/dataloader_idx_" in name:
        raise MisconfigurationException(
            f"self.log({name!r}, ...): the loader's number is added to the name. Leave it out, or pass"
            " add_dataloader_idx=False."
        )
    on_step = per_step if options.on_step is None else options.on_step
    on_epoch = not per_step if options.on_epoch is None else options.on_epoch
    if hook in _EPOCH_HOOKS and (on_step or not on_epoch):
        raise MisconfigurationException(
            f"self.log({name!r}, on_step={on_step}, on_epoch={on_epoch}) inside `{hook}`, which is no batch hook: only"
            " on_epoch=True is to be had there."
        )
    if not on_step and not on_epoch:
        raise MisconfigurationException(
            f"self.log({name!r}, on_step=False, on_epoch=False) records nothing: set one of them."
        )
    given = options.reduce_fx
    reduction = _REDUCTION_NAMES.get(given.lower() if isinstance(given, str) else given)
    if reduction is None:
        raise MisconfigurationException(
            f"self.log({name!r}, reduce_fx={given!r}): use 'mean', 'sum', 'min' or 'max', or log a torchmetrics Metric,"
            " which reduces as it likes."
        )
    return _Entry(name, suffix, loader, on_step, on_epoch, options.prog_bar, options.logger, reduction)


def _scalar(name: str, value: Any, enable_graph: bool) -> torch.Tensor:
    """`value` as a floating-point number that nobody else changes; half precision is too coarse to add up."""
    default = torch.get_default_dtype()
    wide = default if default in (torch.float32, torch.float64) else torch.float32
    if isinstance(value, torch.Tensor):
        # cloned: the caller may change it in place (a running total) while the epoch's value is kept here
        tensor = value if enable_graph else value.detach().clone()
        if tensor.dtype not in (torch.float32, torch.float64):
            tensor = tensor.to(wide)
    elif not isinstance(value, numbers.Number):
        raise ValueError(
            f"self.log({name!r}, ...) got {value!r}: it takes a number, a scalar tensor or a torchmetrics Metric. For"
            " several values there is self.log_dict."
        )
    else:
        tensor = torch.as_tensor(value, dtype=wide)
    if tensor.numel() != 1:
        raise ValueError(
            f"self.log({name!r}, ...) takes one number; got a tensor of shape {tuple(tensor.shape)}. Reduce it first."
        )
    return tensor.reshape(()) if tensor.ndim else tensor


def _first_length(batch: Any) -> int:
    found: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor.size(0) if tensor.ndim else 1)
        return tensor

    map_tensors(batch, note)
    return found[0] if found else 1


def _detached(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.detach()


def _on(module: torch.nn.Module, value: torch.Tensor | None) -> torch.Tensor | None:
    first = next(module.parameters(), None)
    return value if value is None or first is None else value.to(first.device)
