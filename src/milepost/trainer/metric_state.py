"""What torchmetrics objects have accumulated. Their own ``state_dict`` leaves that out unless it is made persistent."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # importing it takes longer than torch does, so that is left to those who use it
    from torchmetrics import Metric, MetricCollection
    from torchmetrics.wrappers import MetricTracker

_COMPILED = "_orig_mod."
# what wrappers keep beside the states that they declare
_UNDECLARED = ("min_val", "max_val", "_num_vals_seen", "_increment_called")


def is_metric(value: Any) -> TypeGuard[Metric]:
    """Whether `value` is a metric object of torchmetrics. Nothing is before that has been imported."""
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, torchmetrics.Metric)


def is_collection(value: Any) -> TypeGuard[MetricCollection]:
    """Whether `value` is a MetricCollection."""
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, torchmetrics.MetricCollection)


def metric_paths(module: nn.Module) -> dict[int, str]:
    """Path in `module` of every metric object, by its id."""
    return {id(metric): path for path, metric in _metrics(module)}


def metrics_by_path(module: nn.Module) -> dict[str, Metric]:
    """The metric objects in `module`, by path."""
    return dict(_metrics(module))


def metric_states(module: nn.Module, skip: Collection[int] = ()) -> dict[str, Any]:
    """States of all metric objects in `module` that have been updated, by path; plain values and tensors.

    Wrappers do not count updates, so theirs are always among them.

    Args:
        skip: ids of those that are about to be reset.
    """
    for part in module.modules():
        if is_collection(part):
            part.values(copy_state=False)  # members of a compute group are brought up to date only when asked for
    states: dict[str, Any] = {
        path: _state(metric)
        for path, metric in _metrics(module)
        if id(metric) not in skip and (metric._update_count or _is_wrapper(metric))
    }
    for path, tracker in _trackers(module):
        if len(tracker):
            states[path] = {"steps": len(tracker)}
    return states


def restore_metric_states(module: nn.Module, states: dict[str, Any]) -> None:
    """Put back what `metric_states` returned. Metrics that it does not name are reset; unknown paths are left out."""
    for path, tracker in _trackers(module):
        while len(tracker) < states.get(path, {}).get("steps", 0):
            tracker.increment()
    for path, metric in _metrics(module):
        if metric._update_count:  # updated since the module was made: by the hooks that came first
            metric.reset()
        if path in states and "updates" in states[path]:
            _restore(metric, states[path])


def _metrics(module: nn.Module) -> Iterator[tuple[str, Metric]]:
    for path, part in module.named_modules():
        if is_metric(part):
            yield path.replace(_COMPILED, ""), part


def _is_wrapper(metric: Metric) -> bool:
    from torchmetrics.wrappers.abstract import WrapperMetric

    return isinstance(metric, WrapperMetric)


def _trackers(module: nn.Module) -> Iterator[tuple[str, MetricTracker]]:
    if "torchmetrics" not in sys.modules:
        return
    from torchmetrics.wrappers import MetricTracker

    for path, part in module.named_modules():
        if isinstance(part, MetricTracker):
            yield path.replace(_COMPILED, ""), part


def _state(metric: Metric) -> dict[str, Any]:
    return {
        "updates": metric._update_count,
        "states": {name: _detached(getattr(metric, name)) for name in metric._defaults},
        "undeclared": {name: value for name in _UNDECLARED if (value := metric.__dict__.get(name)) is not None},
    }


def _detached(value: Any) -> Any:
    # a copy: metrics add to their tensors in place, and a plugin may write this later
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [_detached(item) for item in value] if isinstance(value, list) else value


def _restore(metric: Metric, state: dict[str, Any]) -> None:
    for name in metric._defaults:
        if name in state["states"]:
            setattr(metric, name, _on(state["states"][name], metric.device))
    for name, value in state["undeclared"].items():
        setattr(metric, name, _on(value, metric.device))
    metric._update_count = state["updates"]
    metric._computed = None


def _on(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().to(torch.device(device))
    return [_on(item, device) for item in value] if isinstance(value, list) else value
