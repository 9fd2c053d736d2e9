"""Lazy staging: what only optimizers change is copied while the loop goes on, and their next step waits for it.

Proven right where every change of a tensor goes through the ``step`` of an optimizer of ``torch.optim``: parameters,
and the optimizer's state. torch calls a hook before each of these steps, fused, foreach or not, through a GradScaler or
out of a backward pass; the hook waits, where the step is given a closure once that has run. Everything else is copied
at once: buffers (BatchNorm changes them in forward), gradients (backward), averages, tensors that no optimizer knows,
and all that `steps_alone_change` cannot vouch for.

Whoever writes to parameters by hand between a save and the next step waits for the handle's `staged` first. Where that
is forgotten, a write that torch counts (all but those through ``.data``) fails the save; ``MILEPOST_CHECK_LAZY=1``
compares every byte.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol

import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from milepost.engine.requests import BlobPlan

CHECK_VARIABLE = "MILEPOST_CHECK_LAZY"
"""Set to 1: each lazy copy is compared with one made at once. Takes the memory and the time of that copy."""


class Staging(Protocol):
    """Something that is being copied."""

    def hold(self) -> None:
        """Make sure that a step which begins after this does not reach the copy."""

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for its end; what it failed with."""


class StepGate:
    """Holds back the steps of all optimizers of the process while something of theirs is being copied."""

    def __init__(self) -> None:
        self.held_seconds = 0.0
        """How long steps have waited, in all."""
        self._open: list[Staging] = []
        self._lock = threading.Lock()
        self._hook: Any = None

    def hold_until(self, staging: Staging) -> None:
        """Steps from now on wait for `staging` to end, well or badly."""
        with self._lock:
            self._open.append(staging)
            if self._hook is None:
                self._hook = register_optimizer_step_pre_hook(self._before_step)

    def wait(self) -> None:
        """Wait until nothing of an optimizer's is being copied."""
        self._let_go(lambda staging: staging.exception())  # what it failed with is told by the save's handle

    def _let_go(self, wait: Callable[[Staging], Any]) -> None:
        with self._lock:
            waiting = list(self._open)
        for staging in waiting:
            wait(staging)
        with self._lock:
            self._open = [staging for staging in self._open if staging not in waiting]

    def release(self) -> None:
        """Wait for all, and hold nothing back any more."""
        self.wait()
        with self._lock:
            if self._hook is not None and not self._open:
                self._hook.remove()
                self._hook = None

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if not self._open:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None or not _of_torch(optimizer):
            self._hold()
            return None

        def closure_then_wait() -> Any:  # forward and backward run in here, and all of torch's optimizers call it first
            result = closure()
            self._hold()
            return result

        if len(args) > 1:
            return (args[0], closure_then_wait, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_then_wait}

    def _hold(self) -> None:
        begin = time.perf_counter()
        self._let_go(lambda staging: staging.hold())
        self.held_seconds += time.perf_counter() - begin


# ---- what can wait -------------------------------------------------------------------------------------------------


def changed_by_steps(values: Iterable[Any]) -> dict[int, int]:
    """The tensors that only steps of the optimizers among `values` change: from address to bytes."""
    if inside_a_step():
        return {}
    found: dict[int, int] = {}
    for value in values:
        if isinstance(value, Optimizer) and steps_alone_change(value):
            trained = [p for group in value.param_groups for p in group["params"] if p.requires_grad]
            for tensor in [*trained, *_tensors(value.state)]:
                if can_wait(tensor):
                    found[tensor.data_ptr()] = tensor.nbytes
    return found


def steps_alone_change(optimizer: Optimizer) -> bool:
    """Whether parameters and state of `optimizer` change in calls of its `step` only, and torch's hook sees those.

    Not so for classes of others (which may write in methods of other names), for a `step` put on the object, such as a
    compiled one, for steps out of hooks of the backward pass, and for those that a CUDA graph replays.
    """
    own = vars(optimizer).get("step")
    if own is not None and not _only_counts(own, type(optimizer).step):
        return False
    if not _of_torch(optimizer) or not getattr(type(optimizer).step, "hooked", False):
        return False
    if any(group.get("capturable") for group in optimizer.param_groups):
        return False
    return not any(
        hasattr(p, "_in_backward_optimizers") or getattr(p, "_post_accumulate_grad_hooks", None)
        for group in optimizer.param_groups
        for p in group["params"]
    )


def _only_counts(own: Any, step: Any) -> bool:
    """Whether a step put on an optimizer is a scheduler's, which counts, around that of its class and no other one."""
    of_scheduler = getattr(getattr(own, "__code__", None), "co_filename", "") == lr_scheduler.__file__
    return of_scheduler and getattr(own, "__wrapped__", None) is step


def inside_a_step() -> bool:
    """Whether the caller was called by an optimizer's step, out of its closure: then the hook is past already."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _STEP_CODE:
        frame = frame.f_back
    return frame is not None


_STEP_CODE = Optimizer.profile_hook_step(lambda self: None).__code__


def _of_torch(optimizer: Optimizer) -> bool:
    return f"{type(optimizer).__module__}.".startswith("torch.optim.")


def can_wait(tensor: torch.Tensor) -> bool:
    """Whether it is plain memory, of the host or a GPU, whose writes torch counts."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and (tensor.is_cpu or tensor.is_cuda)
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_inference()
        and tensor.nbytes > 0
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def rows_that_can_wait(plan: BlobPlan, known: Mapping[int, int]) -> set[int]:
    """Rows of a blob whose tensors `known` holds: not one that begins where a shorter one of the optimizer's does."""
    return {
        row
        for row, tensor in enumerate(plan.tensors)
        if tensor.nbytes <= known.get(tensor.data_ptr(), -1) and tensor.is_contiguous()
    }


# ---- whether it was right ------------------------------------------------------------------------------------------


class WrittenMeanwhile(RuntimeError):
    """What was copied is of no one moment. Whoever saves it raises `CheckpointSaveError` from this."""


class Watch:
    """Finds out, once the tensors are copied, whether somebody has written to them meanwhile.

    Args:
        tensors: by name.
        compare: keep a copy of each, and compare bytes; else ask torch, which does not count writes through ``.data``.
    """

    def __init__(self, tensors: Sequence[tuple[str, torch.Tensor]], compare: bool | None = None) -> None:
        self._tensors = [(name, tensor, tensor._version) for name, tensor in tensors]
        compare = os.environ.get(CHECK_VARIABLE) == "1" if compare is None else compare
        self._before = [tensor.detach().clone() for _, tensor, _ in self._tensors] if compare else []

    def written(self) -> list[str]:
        """Names of those that torch has counted a write to. Call it before the next step."""
        return [name for name, tensor, version in self._tensors if tensor._version != version]

    def violation(self, copies: Sequence[int], written: Sequence[str] | None = None) -> WrittenMeanwhile | None:
        """What is to be raised; None where all is well. Call it once all is copied.

        Args:
            copies: the addresses of the copies, in the same order.
            written: what `written` has returned, where a step may have come since.
        """
        written = self.written() if written is None else written
        if not written:
            written = [
                name
                for (name, _, _), before, copy in zip(self._tensors, self._before, copies, strict=False)
                if not torch.equal(before.reshape(-1).view(torch.uint8).cpu(), _bytes_at(copy, before.nbytes))
            ]
        if not written:
            return None
        more = f" and {len(written) - 1} more" if len(written) > 1 else ""
        return WrittenMeanwhile(
            f"{written[0]!r}{more} was written to while it was being copied, and not by a step of an optimizer: the"
            " checkpoint would be of no one moment. Call the handle's staged() before writing to weights by hand"
            " (trainer.finish_staging() under a Trainer), or save without lazy=True"
        )


def _bytes_at(address: int, size: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.uint8)
