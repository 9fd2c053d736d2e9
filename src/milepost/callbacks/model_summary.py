"""Show the layers of the model and their sizes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from milepost.callbacks.callback import Callback
from milepost.errors import MisconfigurationException

if TYPE_CHECKING:
    from milepost.trainer.module import Module
    from milepost.trainer.trainer import Trainer


@dataclass(frozen=True)
class Layer:
    """One submodule: its dotted name, its class, the parameters in and below it, and its mode."""

    name: str
    kind: str
    parameters: int
    training: bool


@dataclass(frozen=True)
class Summary:
    """What `summarize` finds. A parameter that is shared counts once in the totals."""

    layers: list[Layer]
    trainable: int
    total: int
    size_bytes: int


def summarize(module: nn.Module, max_depth: int = 1) -> Summary:
    """List the submodules down to `max_depth` levels (-1 for all) and count parameters."""
    layers = [
        Layer(name, type(child).__name__, _count(child.parameters()), child.training)
        for name, child in module.named_modules()
        if name and (max_depth == -1 or name.count(".") < max_depth)
    ]
    parameters = list(module.parameters())
    return Summary(
        layers,
        trainable=_count(p for p in parameters if p.requires_grad),
        total=_count(parameters),
        size_bytes=sum(
            p.numel() * p.element_size() for p in parameters if not isinstance(p, nn.UninitializedParameter)
        ),
    )


class ModelSummary(Callback):
    """Prints a table of the layers when fit starts, on rank 0 and where the output is a terminal.

    Args:
        max_depth: levels of submodules that are listed; -1 for all, 0 for no table.
        console: where to print; the standard output if None.
        summarize_kwargs: passed to ``rich.table.Table``, such as ``header_style``.
    """

    def __init__(self, max_depth: int = 1, *, console: Console | None = None, **summarize_kwargs: Any) -> None:
        if max_depth < -1:
            raise MisconfigurationException(f"max_depth is {max_depth!r}; give -1 (all levels), 0 (no table) or more")
        self._max_depth = max_depth
        self._console = console
        self._table_options = summarize_kwargs

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self._max_depth == 0 or not trainer.is_global_zero or not (self._console or sys.stdout.isatty()):
            return
        summary = summarize(pl_module, self._max_depth)
        table = Table("Name", "Type", "Parameters", "Mode", **self._table_options)
        for layer in summary.layers:
            table.add_row(layer.name, layer.kind, f"{layer.parameters:,}", "train" if layer.training else "eval")
        console = self._console or Console()
        console.print(table)
        console.print(
            f"{summary.trainable:,} trainable and {summary.total - summary.trainable:,} other parameters, "
            f"{summary.size_bytes / 1e6:.3f} MB"
        )


class RichModelSummary(ModelSummary):
    """The same table under the name that Lightning users know."""


def _count(parameters: Iterable[torch.Tensor]) -> int:
    # A lazy layer's parameters have no shape before the first batch.
    return sum(p.numel() for p in parameters if not isinstance(p, nn.UninitializedParameter))
