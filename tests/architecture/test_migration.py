"""The migration page's table of Trainer arguments is true: complete by both signatures, each value tried."""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from milepost import Trainer
from milepost.errors import MisconfigurationException

PAGE = Path(__file__).parents[2] / "docs/migration.md"
ROW = re.compile(r"^\| `(\w+)` \| `(.+?)` \| (?:`(.+?)`|—) \|$", re.MULTILINE)
ROWS = ROW.findall(PAGE.read_text().split("## Every argument of `Trainer`")[1].split("\n## ")[0])
REFUSED = [(name, ast.literal_eval(value)) for name, _, value in ROWS if value]


@pytest.fixture(autouse=True)
def _same_switches_afterwards() -> Iterator[None]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    anomaly = torch.is_anomaly_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.autograd.set_detect_anomaly(anomaly)


def arguments(trainer: Any) -> set[str]:
    return set(inspect.signature(trainer).parameters)


def test_table_names_every_argument_of_both_trainers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("pytorch_lightning")
    named = {name for name, _, _ in ROWS}
    assert named == arguments(lightning.Trainer)
    assert named == arguments(Trainer)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, value, _ in ROWS])
def test_taken_value_constructs(name: str, value: str, tmp_path: Path) -> None:
    quiet = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
    Trainer(**{**quiet, name: ast.literal_eval(value)})


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_refused_value_raises_naming_argument_or_value(name: str, value: Any, tmp_path: Path) -> None:
    quiet = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
    with pytest.raises(MisconfigurationException, match=rf"{name.rstrip('s')}|{re.escape(repr(value))}"):
        Trainer(**{**quiet, name: value})
