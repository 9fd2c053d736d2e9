"""The order of all hooks is Lightning's, but for the deviations that docs/design/001-hook-order.md explains."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from hook_deviations import DEVIATIONS, Deviation, Events, aligned
from hook_record import STRATEGY, callback_names, data_names, module_names, names_of
from hook_scenarios import SCENARIOS, run

import milepost
from milepost.strategies import Strategy

pl = pytest.importorskip("pytorch_lightning")

PAGE = Path(__file__).parents[2] / "docs" / "design" / "001-hook-order.md"
Records = dict[str, tuple[Events, Events]]


@pytest.fixture(scope="module")
def records() -> Records:
    """What each scenario does on Lightning and on Milepost. Filled by `record`."""
    return {}


@pytest.fixture
def record(records: Records, tmp_path: Path) -> Any:
    def of(scenario: str) -> tuple[Events, Events]:
        if scenario not in records:
            lightning, milepost_ = sides()
            place = tmp_path / re.sub(r"\W", "_", scenario)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Lightning's own, and that of torch which it brings about
                theirs = run(lightning, scenario, place / "lightning")
            records[scenario] = (theirs, run(milepost_, scenario, place / "milepost"))
        return records[scenario]

    return of


def sides() -> tuple[Any, Any]:
    for side in (pl, milepost):
        for part in ("callbacks", "loggers", "plugins", "strategies"):
            importlib.import_module(f"{side.__name__}.{part}")
    return pl, milepost


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_hooks_run_in_lightnings_order(scenario: str, record: Any) -> None:
    theirs, ours = aligned(*record(scenario), DEVIATIONS)
    assert theirs, "nothing was recorded"
    lines = difflib.unified_diff([*map(str, theirs)], [*map(str, ours)], "Lightning", "Milepost", n=3, lineterm="")
    assert theirs == ours, "undocumented difference:\n" + "\n".join(list(lines)[:80])


@pytest.mark.parametrize("deviation", DEVIATIONS, ids=lambda deviation: deviation.name)
def test_each_deviation_is_needed(deviation: Deviation, record: Any) -> None:
    others = [other for other in DEVIATIONS if other is not deviation]
    for scenario in SCENARIOS:
        theirs, ours = aligned(*record(scenario), others)
        if theirs != ours:
            return
    raise AssertionError(f"{deviation.name!r} makes no difference any more: take it out of {PAGE.name}")


def test_the_page_gives_a_reason_for_each_deviation() -> None:
    sections = re.split(r"^### ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    reasons = {title: text for title, _, text in (section.partition("\n") for section in sections)}
    assert list(reasons) == [deviation.name for deviation in DEVIATIONS]
    for name, text in reasons.items():
        assert len(text.split()) > 15, f"{name}: what differs, and why?"


OWNERS = [
    ("module", milepost.LightningModule, pl.LightningModule, module_names),
    ("data", milepost.LightningDataModule, pl.LightningDataModule, data_names),
    ("callback", milepost.Callback, pl.Callback, callback_names),
]


@pytest.mark.parametrize(("owner", "ours", "theirs", "names"), OWNERS, ids=[owner[0] for owner in OWNERS])
def test_every_hook_is_there_and_is_called(owner: str, ours: Any, theirs: Any, names: Any, record: Any) -> None:
    callbacks = ("callback", "module's callback", "early_stopping", "checkpointer", "model_checkpoint")
    called = {
        event.hook
        for scenario in SCENARIOS
        for event in record(scenario)[1]
        if event.owner == owner or (owner == "callback" and event.owner in callbacks)
    }
    for name in names():
        assert callable(getattr(ours, name, None)), f"{ours.__name__} has no {name}"
        if hasattr(theirs, name):
            assert _parameters(ours, name) == _parameters(theirs, name)
        assert name in called, f"{ours.__name__}.{name} is never called"


def _parameters(cls: type, name: str) -> list[str]:
    return list(inspect.signature(getattr(cls, name)).parameters)


def test_the_page_names_what_strategies_lack() -> None:
    """Those hooks of Lightning's strategies that no strategy of ours has yet."""
    lacking = [name for name in names_of(pl.strategies.Strategy) if not hasattr(Strategy, name)]
    listed = re.search(r"^Lightning's strategies also have (.*?)\.$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert listed and re.findall(r"`(\w+)`", listed.group(1)) == lacking
    assert set(STRATEGY) <= set(dir(Strategy))
