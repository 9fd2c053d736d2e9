"""EarlyStopping: when it stops, and that its state survives a restart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from milepost.callbacks import EarlyStopping
from milepost.errors import MisconfigurationException


def trainer(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": 1,
        "state": SimpleNamespace(fn="fit"),
        "sanity_checking": False,
        "fast_dev_run": False,
        "callback_metrics": {},
        "current_epoch": 0,
        "should_stop": False,
        "is_global_zero": True,
    }
    return SimpleNamespace(**{**values, **changes})


def run(stopper: EarlyStopping, values: list[float], t: Any = None) -> int | None:
    """Epoch (from 0) at which `stopper` stops, seeing one value per epoch."""
    t = t or trainer()
    module: Any = torch.nn.Identity()
    stopper.setup(t, module, "fit")
    for epoch, value in enumerate(values):
        t.current_epoch, t.callback_metrics = epoch, {"m": torch.tensor(value)}
        stopper.on_validation_end(t, module)
        stopper.on_train_epoch_end(t, module)
        if t.should_stop:
            return epoch
    return None


@pytest.mark.parametrize(
    ("options", "values", "stops_at"),
    [
        ({"patience": 2}, [1.0, 0.9, 0.95, 0.92, 0.1], 3),
        ({"patience": 1, "mode": "max"}, [1.0, 2.0, 3.0, 2.5], 3),
        ({"patience": 1, "min_delta": 0.1}, [1.0, 0.95], 1),
        ({"patience": 1, "min_delta": 0.1, "mode": "max"}, [1.0, 1.2, 1.25], 2),
        ({}, [1.0, float("nan")], 1),
        ({"check_finite": False, "patience": 2}, [1.0, float("nan"), 0.5], None),
        ({"stopping_threshold": 0.5}, [1.0, 0.4], 1),
        ({"divergence_threshold": 5.0}, [1.0, 6.0], 1),
        ({"divergence_threshold": 5.0, "mode": "max"}, [6.0, 4.0], 1),
    ],
)
def test_stops(options: dict[str, Any], values: list[float], stops_at: int | None) -> None:
    stopper = EarlyStopping("m", **options)
    assert run(stopper, values) == stops_at
    assert stopper.stopped_epoch == (stops_at or 0)
    assert (stopper.stopping_reason_message is None) == (stops_at is None)


def test_a_restart_goes_on_counting() -> None:
    first = EarlyStopping("m", patience=3)
    run(first, [1.0, 2.0, 2.0])
    second = EarlyStopping("m", patience=9)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert set(first.state_dict()) == {"wait_count", "stopped_epoch", "best_score", "patience"}
    assert run(second, [2.0]) == 0


def test_checks_when_validation_ends_if_that_is_not_once_per_epoch() -> None:
    stopper, t, module = EarlyStopping("m", patience=1), trainer(val_check_interval=0.5), torch.nn.Identity()
    stopper.setup(t, module, "fit")
    t.callback_metrics = {"m": torch.tensor(1.0)}
    stopper.on_train_epoch_end(t, module)
    assert torch.isinf(stopper.best_score)
    stopper.on_validation_end(t, module)
    assert stopper.best_score == 1.0


def test_ignores_the_sanity_check_and_other_stages() -> None:
    stopper = EarlyStopping("m", check_on_train_epoch_end=False)
    assert run(stopper, [float("nan")], trainer(sanity_checking=True)) is None
    other = SimpleNamespace(fn="validate")
    assert run(stopper, [float("nan")], trainer(state=other)) is None


def test_a_metric_that_is_not_there() -> None:
    with pytest.raises(MisconfigurationException, match=r"'other'.*'m'"):
        run(EarlyStopping("other"), [1.0])
    assert run(EarlyStopping("other", strict=False), [1.0]) is None


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="auto"):
        EarlyStopping("m", mode="auto")


def test_tells_what_it_sees(capsys: pytest.CaptureFixture[str]) -> None:
    run(EarlyStopping("m", verbose=True, patience=1), [1.0, 1.0])
    assert "improved" in (out := capsys.readouterr().out) and "did not improve" in out
