"""What ``self.log`` records: values of a step, and means over an epoch that a resumed run continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torchmetrics import Metric

from milepost.errors import MisconfigurationException
from milepost.trainer.transfer import map_tensors

_FORBIDDEN = frozenset(
    {"setup", "teardown", "on_fit_start", "on_fit_end", "on_train_end", "on_validation_end", "on_test_end"}
)
_REDUCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}


@dataclass
class _Entry:
    """One logged key of the running epoch."""

    key: str
    on_step: bool
    on_epoch: bool
    prog_bar: bool
    logger: bool
    reduction: str | Callable[[torch.Tensor], torch.Tensor]
    value: torch.Tensor | None = None  # of the last step
    total: torch.Tensor | None = None  # running reduction
    weight: float = 0.0
    history: list[torch.Tensor] | None = None  # only for a reduction that is a function of all values
    metric: Metric | None = None

    def add(self, value: torch.Tensor, batch_size: Callable[[], int]) -> None:
        self.value = value
        if not self.on_epoch:
            return
        if callable(self.reduction):
            self.history = [*(self.history or []), value]
        elif self.reduction == "mean":
            size = batch_size()
            weighted = value * size if value.is_floating_point() else value.float() * size
            self.total = weighted if self.total is None else self.total + weighted
            self.weight += size
        else:
            self.total = value if self.total is None else _REDUCTIONS[self.reduction](self.total, value)

    def epoch_value(self) -> torch.Tensor | None:
        if self.metric is not None:
            return torch.as_tensor(self.metric.compute()).detach()
        if callable(self.reduction):
            return self.reduction(torch.stack(self.history)) if self.history else None
        if self.total is None:
            return None
        return self.total / self.weight if self.reduction == "mean" else self.total


class EpochMetrics:
    """The entries of one training or evaluation epoch."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], _Entry] = {}

    def names(self, entry: _Entry) -> tuple[str, str]:
        forked = entry.on_step and entry.on_epoch
        return (f"{entry.key}_step", f"{entry.key}_epoch") if forked else (entry.key, entry.key)

    def state_dict(self) -> list[dict[str, Any]]:
        """The running reductions, as plain values and tensors. Functions and metrics are found again by name."""
        return [
            {
                "hook": hook, "key": e.key, "on_step": e.on_step, "on_epoch": e.on_epoch, "prog_bar": e.prog_bar,
                "logger": e.logger, "reduction": e.reduction, "total": e.total, "weight": e.weight, "value": e.value,
            }
            for (hook, _), e in self.entries.items()
            if e.metric is None and isinstance(e.reduction, str)
        ]  # fmt: skip

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        for item in state:
            fields = dict(item)
            hook = fields.pop("hook")
            self.entries[(hook, fields["key"])] = _Entry(**fields)


class Metrics:
    """The three views that users read, and the epochs that feed them."""

    def __init__(self, step: Callable[[], int]) -> None:
        self._step = step
        self.callback: dict[str, torch.Tensor] = {}
        self.logged: dict[str, torch.Tensor] = {}
        self.progress_bar: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        self.training = EpochMetrics()
        self.evaluation = EpochMetrics()
        self.current: EpochMetrics = self.training
        self._batch: Any = None
        self._batch_size: int | None = None
        self._suffix = ""
        self._touched: list[_Entry] = []

    def begin_epoch(self, training: bool) -> None:
        self.current = EpochMetrics()
        if training:
            self.training = self.current
        else:
            self.evaluation = self.current
        self._touched = []

    def begin_batch(self, batch: Any, suffix: str = "") -> None:
        self._batch, self._batch_size, self._suffix = batch, None, suffix
        self._touched = []

    def record(
        self,
        hook: str,
        name: str,
        value: Any,
        *,
        prog_bar: bool,
        logger: bool,
        on_step: bool | None,
        on_epoch: bool | None,
        reduce_fx: Any,
        enable_graph: bool,
        add_dataloader_idx: bool,
        batch_size: int | None,
    ) -> None:
        """Take one ``self.log`` call made inside `hook`."""
        key = name + self._suffix if add_dataloader_idx else name
        entry = self.current.entries.get((hook, key))
        if entry is None:
            entry = self._new_entry(hook, key, on_step, on_epoch, reduce_fx, prog_bar, logger)
        if isinstance(value, Metric):
            entry.metric = value
            last = getattr(value, "_forward_cache", None)
            entry.value = None if last is None else torch.as_tensor(last).detach()
        elif isinstance(value, Mapping):
            raise ValueError(
                f"self.log({name!r}, ...) got a {type(value).__name__}: use self.log_dict for several values."
            )
        else:
            entry.add(_scalar(name, value, enable_graph), (lambda: batch_size) if batch_size else self._size_of_batch)
        self._touched.append(entry)
        if entry.on_step and entry.value is not None:
            self._publish_step(entry)

    def _new_entry(
        self,
        hook: str,
        key: str,
        on_step: bool | None,
        on_epoch: bool | None,
        reduce_fx: Any,
        prog_bar: bool,
        logger: bool,
    ) -> _Entry:
        if hook in _FORBIDDEN:
            raise MisconfigurationException(
                f"self.log({key!r}, ...) inside `{hook}`: values cannot be logged there. Log in a step or an epoch"
                " hook."
            )
        per_batch = hook == "training_step" or "train_batch" in hook or hook in _BACKWARD
        epoch_hook = not per_batch and "batch" not in hook and not hook.endswith("_step")
        if not callable(reduce_fx) and reduce_fx not in ("mean", *_REDUCTIONS):
            raise MisconfigurationException(
                f"self.log({key!r}, reduce_fx={reduce_fx!r}): use 'mean', 'sum', 'min', 'max' or a function."
            )
        if epoch_hook and on_step:
            raise MisconfigurationException(
                f"self.log({key!r}, on_step=True) inside `{hook}`, which is no batch hook: use on_epoch=True."
            )
        entry = _Entry(
            key=key,
            on_step=per_batch if on_step is None else on_step,
            on_epoch=not per_batch if on_epoch is None else on_epoch,
            prog_bar=prog_bar,
            logger=logger,
            reduction=reduce_fx,
        )
        if not entry.on_step and not entry.on_epoch:
            raise MisconfigurationException(
                f"self.log({key!r}, on_step=False, on_epoch=False) records nothing: set one of them."
            )
        self.current.entries[(hook, key)] = entry
        return entry

    def _size_of_batch(self) -> int:
        if self._batch_size is None:
            self._batch_size = _first_length(self._batch)
        return self._batch_size

    def _publish_step(self, entry: _Entry) -> None:
        assert entry.value is not None
        forked, _ = self.current.names(entry)
        for key in {entry.key, forked}:
            self.callback[key] = entry.value
            self.steps[key] = self._step()
        if entry.prog_bar:
            self.progress_bar[forked] = float(entry.value)

    def step_values(self) -> dict[str, torch.Tensor]:
        """What the loggers get for the batch just run."""
        return {
            self.current.names(e)[0]: e.value for e in self._touched if e.logger and e.on_step and e.value is not None
        }

    def end_epoch(self) -> dict[str, torch.Tensor]:
        """Reduce the epoch, publish it, and return what the loggers get."""
        to_log: dict[str, torch.Tensor] = {}
        for entry in self.current.entries.values():
            if not entry.on_epoch or (value := entry.epoch_value()) is None:
                continue
            _, name = self.current.names(entry)
            for key in {entry.key, name}:
                self.callback[key] = value
                self.steps[key] = self._step()
            if entry.prog_bar:
                self.progress_bar[name] = float(value)
            if entry.logger:
                to_log[name] = value
        return to_log

    def reset_metric_objects(self) -> None:
        for entry in self.current.entries.values():
            if entry.metric is not None:
                entry.metric.reset()

    def evaluation_results(self) -> dict[str, float]:
        """Epoch values of the evaluation epoch, by logged name."""
        results: dict[str, float] = {}
        for entry in self.evaluation.entries.values():
            if entry.on_epoch and (value := entry.epoch_value()) is not None:
                results[self.evaluation.names(entry)[1]] = float(value)
        return results

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.training.state_dict(),
            "callback": dict(self.callback),
            "progress_bar": dict(self.progress_bar),
            "steps": dict(self.steps),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.training.load_state_dict(state["epoch"])
        self.callback.update(state["callback"])
        self.progress_bar.update(state["progress_bar"])
        self.steps.update(state["steps"])


_BACKWARD = frozenset(
    {"on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad", "optimizer_step"}
)


def _scalar(name: str, value: Any, enable_graph: bool) -> torch.Tensor:
    tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(value, dtype=torch.get_default_dtype())
    if tensor.numel() != 1:
        raise ValueError(
            f"self.log({name!r}, ...) takes one number; got a tensor of shape {tuple(tensor.shape)}. Reduce it first."
        )
    tensor = tensor.reshape(())
    # cloned: the caller may change it in place (a running total) while the epoch's value is kept here
    return tensor if enable_graph else tensor.detach().clone()


def _first_length(batch: Any) -> int:
    found: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor.size(0) if tensor.ndim else 1)
        return tensor

    map_tensors(batch, note)
    return found[0] if found else 1
