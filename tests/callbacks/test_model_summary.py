"""ModelSummary counts parameters and prints where somebody looks."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from milepost.callbacks import ModelSummary
from milepost.callbacks.model_summary import Layer, summarize

MODEL: Any = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1, bias=False))).requires_grad_(True)


def test_counts() -> None:
    summary = summarize(MODEL)
    assert summary.layers == [Layer("0", "Linear", 9, True), Layer("1", "Sequential", 3, True)]
    assert (summary.trainable, summary.total, summary.size_bytes) == (12, 12, 48)
    assert [layer.name for layer in summarize(MODEL, -1).layers] == ["0", "1", "1.0"]


def test_frozen_shared_and_lazy_parameters() -> None:
    linear = nn.Linear(2, 2)
    linear.bias.requires_grad_(False)
    tied = nn.ModuleList([linear, linear, nn.LazyLinear(3)])
    summary = summarize(tied)
    assert (summary.trainable, summary.total) == (4, 6)


def test_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    out, t = io.StringIO(), SimpleNamespace(is_global_zero=True)
    ModelSummary(console=Console(file=out, width=100)).on_fit_start(t, MODEL)
    assert "Linear" in out.getvalue() and "12 trainable" in out.getvalue()
    ModelSummary().on_fit_start(t, MODEL)
    assert capsys.readouterr().out == "" and torch.is_grad_enabled()
