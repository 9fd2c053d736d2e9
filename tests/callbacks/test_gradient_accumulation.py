"""GradientAccumulationScheduler sets the Trainer's number by epoch, when resumed midway too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from milepost.callbacks import GradientAccumulationScheduler
from milepost.errors import MisconfigurationException

MODULE: Any = SimpleNamespace(automatic_optimization=True)


def test_by_epoch() -> None:
    scheduler, seen = GradientAccumulationScheduler({1: 4, 3: 2}), []
    t: Any = SimpleNamespace(current_epoch=0, accumulate_grad_batches=1)
    for t.current_epoch in range(5):
        scheduler.on_train_epoch_start(t, MODULE)
        seen.append(t.accumulate_grad_batches)
    assert seen == [1, 4, 4, 2, 2]
    assert scheduler.going_to_accumulate_grad_batches()


def test_a_resumed_epoch_has_its_number_before_the_first_batch() -> None:
    t: Any = SimpleNamespace(current_epoch=2, accumulate_grad_batches=1)
    GradientAccumulationScheduler({0: 2, 2: 8}).on_train_start(t, MODULE)
    assert t.accumulate_grad_batches == 8


def test_refuses_manual_optimization() -> None:
    with pytest.raises(MisconfigurationException, match="manual"):
        GradientAccumulationScheduler({0: 2}).on_train_start(
            SimpleNamespace(current_epoch=0), SimpleNamespace(automatic_optimization=False)
        )


@pytest.mark.parametrize("scheduling", [{}, {-1: 2}, {0: 0}, {0: 1.5}])
def test_refuses_what_cannot_work(scheduling: dict[Any, Any]) -> None:
    with pytest.raises(MisconfigurationException):
        GradientAccumulationScheduler(scheduling)
