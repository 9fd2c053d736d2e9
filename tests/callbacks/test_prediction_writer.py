"""BasePredictionWriter calls what its interval says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from milepost.callbacks import BasePredictionWriter
from milepost.errors import MisconfigurationException


class Writer(BasePredictionWriter):
    def __init__(self, interval: str) -> None:
        super().__init__(interval)
        self.written: list[Any] = []

    def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, *rest: Any) -> None:
        self.written.append((prediction, *rest))

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.written.append(predictions)


@pytest.mark.parametrize(
    ("interval", "written"),
    [
        ("batch", [("p", None, "b", 2, 0)]),
        ("epoch", [["p"]]),
        ("batch_and_epoch", [("p", None, "b", 2, 0), ["p"]]),
    ],
)
def test_intervals(interval: str, written: list[Any]) -> None:
    t: Any = SimpleNamespace(evaluation_loops={"predict": SimpleNamespace(predictions=[["p"]])})
    writer = Writer(interval)
    writer.on_predict_batch_end(t, t, "p", "b", 2)
    writer.on_predict_epoch_end(t, t)
    assert writer.written == written


def test_an_unknown_interval_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="step"):
        BasePredictionWriter("step")
