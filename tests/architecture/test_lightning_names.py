"""Names that Lightning's users know: all are here, but for those that the migration page lists with a reason."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

import milepost

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pl = pytest.importorskip("pytorch_lightning")

PAGE = (Path(__file__).parents[2] / "docs/migration.md").read_text()
SECTION = PAGE.split("## Names that are not there, or differ")[1].split("\n## ")[0]
LISTED = [
    name for cell in re.findall(r"^\| (`.+?`) \|", SECTION, re.MULTILINE) for name in re.findall(r"`(.+?)`", cell)
]
PARTS = ("callbacks", "loggers", "profilers", "utilities")
CLASSES = ("LightningModule", "LightningDataModule", "Trainer", "Callback")


def part(side: Any, name: str) -> Any:
    return importlib.import_module(f"{side.__name__}.{name}")


def public(thing: Any) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def missing() -> set[str]:
    found = {f"{p}.{name}" for p in PARTS for name in set(part(pl, p).__all__) - set(part(milepost, p).__all__)}
    for name in CLASSES:
        theirs, ours = getattr(pl, name), getattr(milepost, name)
        if name == "Trainer":  # its attributes are set when it is made
            theirs, ours = (trainer(logger=False, accelerator="cpu") for trainer in (theirs, ours))
        found |= {f"{name}.{attribute}" for attribute in public(theirs) - public(ours)}
    return found


def spelled(default: Any) -> str:
    """Functions and settings by name and values: each library has its own."""
    if dataclasses.is_dataclass(default) and not isinstance(default, type):
        return type(default).__name__
    return str(getattr(default, "value", getattr(default, "__name__", default)))


def differing(theirs: Any, ours: Any) -> set[str]:
    """Arguments of `theirs` that `ours` lacks, has elsewhere or another default. More by keyword is no difference."""
    if inspect.isclass(theirs) and issubclass(theirs, dict):
        return set()  # dict has no signature
    there = {k: v for k, v in inspect.signature(theirs).parameters.items() if v.kind is not v.VAR_KEYWORD}
    here = inspect.signature(ours).parameters
    if any(p.kind is p.VAR_KEYWORD for p in here.values()) and len(here) == 1:
        ours(**dict.fromkeys(there))  # takes them by name, and refuses what it does not know
        return set()
    by_place = [k for k, v in here.items() if v.kind is v.POSITIONAL_OR_KEYWORD]
    wrong = {k for k, v in there.items() if k not in here or spelled(v.default) != spelled(here[k].default)}
    return wrong | {k for k, other in zip(there, by_place, strict=False) if k != other}


def differences() -> set[str]:
    found = set()
    for p in PARTS:
        for name in set(part(pl, p).__all__) & set(part(milepost, p).__all__):
            theirs, ours = getattr(part(pl, p), name), getattr(part(milepost, p), name)
            found |= {f"{p}.{name}({argument})" for argument in differing(theirs, ours)}
    return found


@pytest.mark.filterwarnings("ignore:GPU available", "ignore:.*does not have many workers")
def test_what_is_missing_or_differs_is_listed_and_nothing_else() -> None:
    assert sorted(LISTED) == sorted(missing() | differences())


@pytest.mark.parametrize(
    ("module", "names"),
    {
        "utilities.rank_zero": "rank_zero_debug rank_zero_deprecation rank_zero_info rank_zero_only rank_zero_warn",
        "utilities.types": "EVAL_DATALOADERS STEP_OUTPUT TRAIN_DATALOADERS LRSchedulerConfigType LRSchedulerPLType "
        "LRSchedulerTypeUnion OptimizerConfig OptimizerLRScheduler OptimizerLRSchedulerConfig",
        "utilities.seed": "isolate_rng",
        "utilities.grads": "grad_norm",
        "utilities.combined_loader": "CombinedLoader",
        "utilities.exceptions": "MisconfigurationException SIGTERMException",
        "loggers.logger": "Logger DummyLogger rank_zero_experiment",
        "trainer": "Trainer seed_everything",
    }.items(),
)
def test_names_in_modules_that_programs_import(module: str, names: str) -> None:
    for name in names.split():
        assert hasattr(part(pl, module), name) and hasattr(part(milepost, module), name), name


def test_top_level_names() -> None:
    assert set(pl.__all__) <= set(milepost.__all__)


def test_a_missing_argument_and_another_default_are_seen() -> None:
    def theirs(a: int, b: int = 1, c: int = 2) -> None: ...

    def ours(a: int, c: int = 2, *, b: int = 2, more: int = 0) -> None: ...

    assert differing(theirs, ours) == {"b"}
    assert differing(theirs, lambda a, b=1: None) == {"c"}
