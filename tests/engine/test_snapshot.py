"""A snapshot is the state of one moment, whatever is done to it later, and shares what the state shares."""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from milepost.engine import snapshot as snapshots
from milepost.engine.staging import Arena


def snapshot(state: Any, arena: Arena | None = None) -> Any:
    with ThreadPoolExecutor(2) as threads:
        made, copying = snapshots.snapshot(state, arena or Arena(), threads, 2)
        assert copying is None
        return made


class Pair(NamedTuple):
    weight: torch.Tensor
    names: list[str]


@dataclasses.dataclass
class Options:
    values: list[int]
    table: Any


class Own:
    def __init__(self) -> None:
        self.items = [1]


def test_nothing_that_can_change_is_shared_with_the_original() -> None:
    tensor, array, words = torch.zeros(3), np.zeros(3), ["a"]
    state = {
        "list": [tensor, [array]],
        "ordered": OrderedDict(a=tensor, b=words),
        "counter": Counter("aab"),
        "default": defaultdict(list, a=words),
        "pair": Pair(tensor, words),
        "tuple": (tensor, words),
        "options": Options([1], array),
        "own": Own(),
        "set": {1},
        "bytes": bytearray(b"a"),
        "objects": np.array([words], dtype=object),
    }
    copy = snapshot(state)
    tensor += 1
    array += 1
    words.append("b")
    state["counter"]["a"] = 9
    state["default"]["b"] = [1]
    state["options"].values.append(2)
    state["own"].items.append(2)
    state["set"].add(2)
    state["bytes"][0] = 0
    assert copy["list"][0].tolist() == [0, 0, 0] and copy["list"][1][0].tolist() == [0, 0, 0]
    assert type(copy["ordered"]) is OrderedDict and copy["ordered"]["a"].sum() == 0 and copy["ordered"]["b"] == ["a"]
    assert copy["counter"] == Counter("aab") and dict(copy["default"]) == {"a": ["a"]}
    assert type(copy["counter"]) is Counter and copy["default"].default_factory is list
    assert type(copy["pair"]) is Pair and copy["pair"].weight.sum() == 0 and copy["pair"].names == ["a"]
    assert copy["tuple"][1] == ["a"] and copy["tuple"][0].sum() == 0
    assert copy["options"].values == [1] and copy["options"].table.tolist() == [0, 0, 0]
    assert copy["own"].items == [1] and copy["set"] == {1} and copy["bytes"] == b"a"
    assert copy["objects"].tolist() == [["a"]]


def test_what_shares_memory_goes_on_sharing_it() -> None:
    weight = torch.arange(12.0)
    array, words = np.arange(3), ["a"]
    state = {"a": weight, "b": [weight], "part": weight[2:8:2], "t": weight.reshape(3, 4).t(), "p": Pair(weight, words)}
    copy = snapshot({**state, "x": array, "y": array, "v": words, "w": {"v": words}})
    storage = copy["a"].untyped_storage().data_ptr()
    for tensor in (copy["b"][0], copy["part"], copy["t"], copy["p"].weight):
        assert tensor.untyped_storage().data_ptr() == storage
    assert storage != weight.untyped_storage().data_ptr()
    assert copy["part"].tolist() == [2, 4, 6] and copy["t"].shape == (4, 3) and copy["t"][1].tolist() == [1, 5, 9]
    assert copy["x"] is copy["y"] and copy["v"] is copy["w"]["v"] and copy["p"].names is copy["v"]


def test_two_storages_at_one_address_are_not_taken_for_one() -> None:
    array = np.arange(6, dtype=np.float32)
    short, long = torch.from_numpy(array[:2]), torch.from_numpy(array)
    copy = snapshot({"short": short, "long": long})
    assert copy["short"].tolist() == [0, 1] and copy["long"].tolist() == [0, 1, 2, 3, 4, 5]


def test_what_contains_itself_is_copied() -> None:
    state: dict[str, Any] = {"list": []}
    state["list"].append(state)
    copy = snapshot(state)
    assert copy["list"][0] is copy and copy is not state


def test_a_tensor_keeps_what_it_is() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    computed = parameter * 2
    copy = snapshot({"p": parameter, "f": frozen, "c": computed, "m": torch.empty(2, device="meta")})
    assert isinstance(copy["p"], torch.nn.Parameter) and copy["p"].requires_grad and not copy["f"].requires_grad
    assert copy["c"].requires_grad and copy["c"].tolist() == [2, 2] and copy["c"].is_leaf
    assert copy["m"].is_meta
    conjugate = torch.tensor([1 + 2j]).conj()
    assert snapshot({"c": conjugate})["c"].tolist() == [1 - 2j]
    assert snapshot(torch.eye(2).to_sparse()).to_dense().tolist() == [[1, 0], [0, 1]]
    assert snapshot(torch.empty(0, 3)).shape == (0, 3)


def test_a_state_dict_keeps_its_versions() -> None:
    state = torch.nn.BatchNorm1d(2).state_dict()
    assert snapshot(state)._metadata == state._metadata
    assert snapshot(state)._metadata is not state._metadata


def test_it_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    snapshot({"w": torch.ones(3)})
    assert torch.equal(before, torch.get_rng_state())


def test_its_tensors_lie_in_one_memory_that_is_used_again_when_nobody_holds_it() -> None:
    arena, weight = Arena(), torch.arange(1000.0)
    state = {"w": weight, "tied": weight, "part": weight[5:9], "b": torch.ones(7, dtype=torch.bfloat16)}
    first = snapshot(state, arena)
    addresses = [tensor.untyped_storage().data_ptr() for tensor in first.values()]
    assert max(addresses) - min(addresses) < arena.size and len(set(addresses)) == 2
    assert arena.copied_bytes == 4000 + 14, "each storage once"
    del first
    again = snapshot(state, arena)
    assert arena.memories == 1 and [t.untyped_storage().data_ptr() for t in again.values()] == addresses
    kept = again["part"]
    del again
    weight.zero_()
    other = snapshot(state, arena)
    assert arena.memories == 2 and kept.tolist() == [5, 6, 7, 8] and other["part"].tolist() == [0, 0, 0, 0]


def test_an_empty_tensor_of_memory_that_is_somewhere() -> None:
    empty = torch.from_numpy(np.empty(0, np.float32))
    copy = snapshot({"w": torch.ones(3), "empty": empty, "part": torch.ones(4)[:0]})
    assert copy["empty"].shape == (0,) and copy["empty"].dtype == torch.float32
    assert copy["w"].tolist() == [1, 1, 1] and copy["part"].shape == (0,)
