"""Lazy staging: what only optimizers change is copied while the loop goes on, and their next step waits for it.

Proven right where every change of a tensor goes through the ``step`` of a torch optimizer: parameters, and the state of
optimizers. torch calls a hook before each of these steps, fused, foreach or not, through a GradScaler or out of a
backward pass; the hook waits. Buffers (BatchNorm changes them in forward), gradients (backward), averages and tensors
that no optimizer knows are copied at once. Whoever writes to parameters by hand, or loads other weights into them,
between a save and the next step must not ask for lazy staging, or wait for the handle's `staged` first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from milepost.engine.requests import BlobPlan

Staging = Future[None]


class StepGate:
    """Holds back the steps of all optimizers of the process while something of theirs is being copied."""

    def __init__(self) -> None:
        self._open: list[Staging] = []
        self._lock = threading.Lock()
        self._hook: Any = None

    def hold_until(self, staging: Staging) -> None:
        """Steps from now on wait for `staging` to end, well or badly."""
        with self._lock:
            self._open.append(staging)
            if self._hook is None:
                self._hook = register_optimizer_step_pre_hook(self._wait)

    def release(self) -> None:
        """Wait for all, and hold nothing back any more."""
        self._wait()
        with self._lock:
            if self._hook is not None and not self._open:
                self._hook.remove()
                self._hook = None

    def _wait(self, *_: Any) -> None:
        with self._lock:
            waiting = list(self._open)
        for staging in waiting:
            staging.exception()  # what it failed with is told by the save's handle
        with self._lock:
            self._open = [staging for staging in self._open if staging not in waiting]


def changed_by_steps(values: Iterable[Any]) -> set[int]:
    """Addresses of the tensors that only the steps of the optimizers among `values` change."""
    found: set[int] = set()
    for value in values:
        if isinstance(value, Optimizer):
            parameters = [p for group in value.param_groups for p in group["params"]]
            for tensor in [*parameters, *_tensors(value.state)]:
                if tensor.device.type == "cpu" and tensor.is_contiguous():
                    found.add(tensor.data_ptr())
    return found - {0}


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def rows_that_can_wait(plan: BlobPlan, addresses: set[int]) -> set[int]:
    """Rows of a blob whose tensors are among `addresses`."""
    return {
        row
        for row, tensor in enumerate(plan.tensors)
        if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.data_ptr() in addresses
    }
