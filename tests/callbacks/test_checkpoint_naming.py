"""File names from templates, and when a checkpointer fires."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from milepost.callbacks._naming import fill, relative, unused
from milepost.callbacks._record import as_yaml
from milepost.callbacks._schedule import Trigger
from milepost.errors import MisconfigurationException

METRICS = {"epoch": 3, "step": 40, "val/loss": torch.tensor(0.25), "acc": torch.tensor(0.5)}


@pytest.mark.parametrize(
    ("template", "insert", "expected"),
    [
        ("{epoch}-{step}", True, "epoch=3-step=40"),
        ("{epoch:02d}-{acc:.2f}", True, "epoch=03-acc=0.50"),
        ("{val/loss:.3f}", True, "val_loss=0.250"),
        ("m-{val/loss:.1f}", False, "m-0.2"),
        ("sub/{epoch}", False, "sub/3"),
        ("plain", True, "plain"),
    ],
)
def test_templates(template: str, insert: bool, expected: str) -> None:
    assert fill(template, METRICS, insert_names=insert) == expected


def test_an_unknown_key_names_those_there_are() -> None:
    with pytest.raises(MisconfigurationException, match=r"'typo'.*acc, epoch, step, val/loss"):
        fill("{typo}", METRICS, insert_names=True)


def test_a_format_that_does_not_fit_is_explained() -> None:
    with pytest.raises(MisconfigurationException, match=r"'acc' as 'd'"):
        fill("{acc:d}", METRICS, insert_names=True)


def test_the_first_free_version() -> None:
    taken = {"a", "a-v1", "a-v2"}
    assert unused("a", lambda n: f"a-v{n}", taken.__contains__, 1) == "a-v3"
    assert unused("b", lambda n: f"b-v{n}", taken.__contains__, 1) == "b"


def test_relative_is_none_outside_the_directory() -> None:
    assert relative("/run/ckpt/sub/a.ckpt", "/run/ckpt") == "sub/a.ckpt"
    assert relative("/run/other/a.ckpt", "/run/ckpt") is None
    assert relative("/run/ckpt/../a.ckpt", "/run/ckpt") is None


def test_trigger_defaults_and_conflicts() -> None:
    assert Trigger.resolve(None, None, None) == Trigger(epochs=1)
    assert Trigger.resolve(5, None, None) == Trigger(steps=5)
    assert Trigger.resolve(0, None, None) == Trigger()
    assert [s for s in range(8) if Trigger(steps=3).at_step(s)] == [3, 6]
    assert [e for e in range(6) if Trigger(epochs=2).at_epoch(e)] == [1, 3, 5]
    assert Trigger(interval=timedelta(seconds=2)).after(2.0)
    assert not Trigger(interval=timedelta(seconds=2)).after(1.9)
    with pytest.raises(MisconfigurationException, match="exclude each other"):
        Trigger.resolve(2, 1, None)
    with pytest.raises(MisconfigurationException, match="negative"):
        Trigger.resolve(-1, None, None)


def test_yaml_numbers_read_back_as_numbers() -> None:
    yaml = pytest.importorskip("yaml")
    scores = {"a b.ckpt": 1e-05, "c": 0.5, "d": float("inf"), "e": 2.5e-07}
    assert yaml.safe_load(as_yaml(scores)) == scores
    assert yaml.safe_load(as_yaml({})) == {}
