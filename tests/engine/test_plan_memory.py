"""Plans kept from save to save: nothing is planned twice, and nothing is stored by a plan that no longer fits."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from milepost.engine.directory import DirectoryEngine


@pytest.fixture
def engine() -> Iterator[DirectoryEngine]:
    made = DirectoryEngine()
    yield made
    made.close()


def state() -> dict[str, Any]:
    weight, tied = torch.randn(6, 4), torch.randn(3)
    return {
        "top": torch.arange(3),
        "model": OrderedDict(weight=weight, bias=torch.randn(4), transposed=torch.randn(5, 2).T, tied=tied, same=tied),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0), "moment": torch.randn(6, 4)}}, "lr": 0.1},
        "list": [1, torch.ones(2, dtype=torch.complex128), {"a": None}],
        "empty": torch.empty(0, 3),
        "epoch": 1,
    }


def calls_of_planning(work: Callable[[], Any]) -> list[str]:
    """What of naming, describing and laying out is called in this thread while `work` runs."""
    planning = {"plan_groups", "plan_blob", "lay_out", "_leaf", "_names"}
    called: list[str] = []

    def seen(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name in planning and "milepost" in frame.f_code.co_filename:
            called.append(frame.f_code.co_name)

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return called


@pytest.mark.parametrize("background", [True, False])
def test_the_second_save_of_a_structure_plans_nothing(
    engine: DirectoryEngine, tmp_path: Path, background: bool
) -> None:
    model = nn.Linear(3, 2)
    kept = state() | {"model": model.state_dict()}
    first = calls_of_planning(lambda: engine.save(tmp_path / "a", kept, background=background).result())
    assert {"plan_groups", "lay_out", "_leaf"} <= set(first)
    with torch.no_grad():
        model.weight.add_(1)
    again = state() | {"model": model.state_dict(), "epoch": 2}  # other tensors, other values, the same structure
    assert calls_of_planning(lambda: engine.save(tmp_path / "b", again, background=background).result()) == []
    assert_same(engine.load(tmp_path / "b"), again)


def other_shape(s: Any) -> None:
    s["model"]["weight"] = s["model"]["weight"].reshape(4, 6)


def other_type(s: Any) -> None:
    s["model"]["bias"] = s["model"]["bias"].double()


def other_stride(s: Any) -> None:
    s["model"]["transposed"] = s["model"]["transposed"].contiguous()


def untied(s: Any) -> None:
    s["model"]["same"] = s["model"]["same"].clone()


def tied_to_another(s: Any) -> None:
    s["model"]["weight"] = s["optimizer"]["state"][0]["moment"]


def grown_in_place(s: Any) -> None:
    s["model"]["bias"].data = torch.randn(9)


def renamed(s: Any) -> None:
    s["model"]["gain"] = s["model"].pop("bias")


def reordered(s: Any) -> None:
    s["model"].move_to_end("weight")


def key_of_another_type(s: Any) -> None:
    s["optimizer"]["state"][True] = s["optimizer"]["state"].pop(0)


def value_instead(s: Any) -> None:
    s["optimizer"]["state"][0]["step"] = 2.0


def tensor_instead(s: Any) -> None:
    s["optimizer"]["lr"] = torch.tensor(0.1)


def moved_up(s: Any) -> None:
    s["bias"] = s["model"].pop("bias")


def of_no_elements(s: Any) -> None:
    s["list"][1] = s["list"][1][:0]


CHANGES = [
    other_shape, other_type, other_stride, untied, tied_to_another, grown_in_place, renamed, reordered,
    key_of_another_type, value_instead, tensor_instead, moved_up, of_no_elements,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_structure_is_stored_as_an_engine_stores_it_that_knows_no_other(
    engine: DirectoryEngine, tmp_path: Path, change: Callable[[Any], None]
) -> None:
    changing = state()
    engine.save(tmp_path / "before", changing)
    change(changing)
    fresh = DirectoryEngine()
    for name, one in (("after", engine), ("fresh", fresh)):
        one.save(tmp_path / name, changing).result()
    fresh.close()
    assert_same(engine.load(tmp_path / "after"), changing)
    loaded = engine.load(tmp_path / "after")["model"]
    if "same" in loaded:
        assert (loaded["same"] is loaded["tied"]) == (change is not untied)
    for file in ("tree.json", "model.index.json", "rest.index.json"):
        assert json.loads((tmp_path / "after" / file).read_bytes()) == json.loads(
            (tmp_path / "fresh" / file).read_bytes()
        )


def test_two_structures_in_turn_are_both_remembered(engine: DirectoryEngine, tmp_path: Path) -> None:
    whole = state()
    weights = {"model": whole["model"]}
    saves = [whole, weights] * 2
    planned = [calls_of_planning(lambda n=n, s=s: engine.save(tmp_path / str(n), s)) != [] for n, s in enumerate(saves)]
    assert planned == [True, True, False, False]


def test_what_is_remembered_holds_no_tensor(engine: DirectoryEngine, tmp_path: Path) -> None:
    big = state()
    held = weakref.ref(big["model"]["weight"])
    engine.save(tmp_path / "a", big)
    engine.close()  # which ends the thread that wrote them; the plans are kept
    del big
    gc.collect()
    assert held() is None


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        if expected.numel():
            assert found.stride() == expected.stride()
        assert found.tolist() == expected.tolist()
    elif isinstance(expected, dict):
        assert list(found) == list(expected) and [type(k) for k in found] == [type(k) for k in expected]
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected and type(found) is type(expected)
