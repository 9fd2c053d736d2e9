"""Which operators the steps of a run spend their time in, with torch's own profiler."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch.autograd.profiler import emit_nvtx as nvtx_ranges
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerAction, profile, tensorboard_trace_handler

from milepost.errors import MisconfigurationException
from milepost.profilers.profiler import Profiler

SORT_KEYS = frozenset(
    {f"{d}_time{t}" for d in ("cpu", "cuda") for t in ("", "_total")}
    | {f"{s}{d}_memory_usage" for s in ("", "self_") for d in ("cpu", "cuda")}
    | {"count"}
)
STEPS = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}


class PyTorchProfiler(Profiler):
    """Records the operators of a few steps with ``torch.profiler``, and writes a trace of them.

    Recording begins at the first step (the first training step of ``fit``). Unless a `schedule` is given, the first
    step is left alone, one warms up and three are recorded; all are where a run has fewer than five. The trace,
    ``STAGE-filename.TIME.pt.trace.json``, can be opened in TensorBoard, Perfetto or chrome://tracing.

    Args:
        dirpath: folder of the report and the trace; the run's ``trainer.log_dir`` if None; no trace without either.
        filename: the report goes to ``STAGE-filename.txt``; printed if None.
        group_by_input_shapes: a row for each shape of an operator's inputs; needs ``record_shapes=True``.
        emit_nvtx: mark operators for NVIDIA's profilers instead; no report, no trace.
        export_to_chrome: write the trace.
        row_limit: rows of the report; -1 for all.
        sort_by_key: see ``PyTorchProfiler.AVAILABLE_SORT_KEYS``; total time on the accelerator, else on the CPU.
        record_module_names: mark each submodule's forward pass by its name.
        table_kwargs: passed to the table of ``torch.profiler``, such as ``max_name_column_width``.
        profiler_kwargs: passed to ``torch.profiler.profile``, such as ``schedule`` or ``profile_memory``.

    Raises:
        MisconfigurationException: an unknown sort key or argument, or a `schedule` that is none.
    """

    AVAILABLE_SORT_KEYS = SORT_KEYS

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        group_by_input_shapes: bool = False,
        emit_nvtx: bool = False,
        export_to_chrome: bool = True,
        row_limit: int = 20,
        sort_by_key: str | None = None,
        record_module_names: bool = True,
        table_kwargs: dict[str, Any] | None = None,
        **profiler_kwargs: Any,
    ) -> None:
        super().__init__(dirpath, filename)
        self._group_by_input_shapes = group_by_input_shapes and bool(profiler_kwargs.get("record_shapes"))
        self._emit_nvtx = emit_nvtx
        self._export_to_chrome = export_to_chrome
        self._sort_by_key = sort_by_key or f"{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
        self._table_kwargs = {**(table_kwargs or {}), "row_limit": row_limit, "sort_by": self._sort_by_key}
        self._record_module_names = record_module_names
        self._profiler_kwargs = profiler_kwargs
        _check(self._sort_by_key, table_kwargs or {}, profiler_kwargs)
        self._lightning_module: Any = None  # set by the Trainer: whose parts to name, and how many steps there are
        self._reset()

    def _reset(self) -> None:
        self.profiler: profile | None = None
        self._open = ExitStack()
        self._entered = False
        self._actions: dict[str, AbstractContextManager[Any]] = {}
        self._table = ""

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | os.PathLike[str] | None = None) -> None:
        super().setup(stage, local_rank, log_dir)
        self._reset()

    def start(self, action_name: str) -> None:
        if not self._entered:
            if self._stage is not None and not action_name.endswith(STEPS[self._stage]):
                return  # what comes before the first step is not for this profiler
            self._enter()
        self._actions[action_name] = record_function(action_name)
        self._actions[action_name].__enter__()

    def stop(self, action_name: str) -> None:
        action = self._actions.pop(action_name, None)
        if action is None:
            return
        action.__exit__(None, None, None)
        if self.profiler is not None and (self._stage is None or action_name.endswith(STEPS[self._stage])):
            self.profiler.step()

    def summary(self) -> str:
        """A table of operators, of what was recorded last."""
        self._close()
        return self._title() + self._table + "\n" if self._table else ""

    def teardown(self, stage: str | None) -> None:
        self._close()
        self._lightning_module = None

    def _enter(self) -> None:
        self._entered = True
        if self._emit_nvtx:
            self._open.enter_context(nvtx_ranges())  # type: ignore[no-untyped-call]
        else:
            options = {"schedule": self._default_schedule(), **self._profiler_kwargs, "on_trace_ready": self._recorded}
            self.profiler = self._open.enter_context(profile(**options))
        if self._record_module_names and self._lightning_module is not None:
            self._name_parts()

    def _default_schedule(self) -> Callable[[int], ProfilerAction] | None:
        if self._stage is None or self._lightning_module is None or self._steps() < 5:
            return None  # record all
        return torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1)

    def _steps(self) -> float:
        name = {"fit": "training", "validate": "val", "test": "test", "predict": "predict"}[str(self._stage)]
        batches: Any = getattr(self._lightning_module.trainer, f"num_{name}_batches")
        return sum(batches) if isinstance(batches, list) else float(batches)

    def _recorded(self, profiler: profile) -> None:
        averages = profiler.key_averages(group_by_input_shape=self._group_by_input_shapes)
        self._table = averages.table(**self._table_kwargs)
        if (own := self._profiler_kwargs.get("on_trace_ready")) is not None:
            own(profiler)
        elif self._export_to_chrome and self._directory is not None:
            tensorboard_trace_handler(str(self._directory), self._stem())(profiler)

    def _name_parts(self) -> None:
        """Mark the forward pass of each submodule, until `_close`."""
        marks: dict[str, AbstractContextManager[Any]] = {}

        def begin(name: str) -> Callable[..., None]:
            def before(*_: Any) -> None:
                marks[name] = record_function(name)
                marks[name].__enter__()

            return before

        def end(name: str) -> Callable[..., None]:
            def after(*_: Any) -> None:
                if (mark := marks.pop(name, None)) is not None:
                    mark.__exit__(None, None, None)

            return after

        for name, part in self._lightning_module.named_modules():
            if name:
                label = f"[module] {type(part).__module__}.{type(part).__name__}: {name}"
                self._open.callback(part.register_forward_pre_hook(begin(label)).remove)
                self._open.callback(part.register_forward_hook(end(label), always_call=True).remove)

    def _close(self) -> None:
        for action in list(self._actions):
            self._actions.pop(action).__exit__(None, None, None)
        self._open.close()
        self.profiler = None


def _check(sort_by_key: str, table: dict[str, Any], options: dict[str, Any]) -> None:
    if sort_by_key not in SORT_KEYS:
        raise MisconfigurationException(f"sort_by_key={sort_by_key!r}: give one of {sorted(SORT_KEYS)}.")
    known = set(inspect.signature(torch.autograd.profiler_util.EventList.table).parameters)
    if wrong := sorted(set(table) - (known - {"self", "sort_by", "row_limit"})):
        raise MisconfigurationException(
            f"table_kwargs has {wrong[0]!r}: it may have {sorted(known - {'self', 'sort_by', 'row_limit'})};"
            " sort_by_key and row_limit are arguments of their own."
        )
    if unknown := sorted(set(options) - set(inspect.signature(profile.__init__).parameters)):
        raise MisconfigurationException(f"{unknown[0]!r} is no argument of torch.profiler.profile.")
    schedule = options.get("schedule")
    if schedule is not None and not (callable(schedule) and isinstance(schedule(0), ProfilerAction)):
        raise MisconfigurationException(
            f"schedule={schedule!r}: give a function from the step to a torch.profiler.ProfilerAction, such as"
            " torch.profiler.schedule(wait=1, warmup=1, active=3)."
        )
