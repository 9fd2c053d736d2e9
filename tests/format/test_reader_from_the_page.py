"""docs/format.md is enough to read a checkpoint directory: this reader uses it, the standard library and NumPy."""

from __future__ import annotations

import base64
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from milepost import PerRank
from milepost.engine.directory import DirectoryEngine
from milepost.engine.votes import Ranks

NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "?", "C64": "<c8",
}  # fmt: skip


def read(directory: Path) -> Any:
    head = json.loads((directory / "manifest.json").read_bytes())
    assert (head["format"], head["version"]) == ("milepost-checkpoint", 1)
    if "listing" in head:
        head |= json.loads((directory / head["listing"]["name"]).read_bytes())
    indexes = [json.loads((directory / blob["index"]["name"]).read_bytes()) for blob in head["blobs"]]
    blobs = [np.memmap(directory / blob["name"], dtype=np.uint8, mode="r") for blob in head["blobs"]]

    def tensor(blob: int, row: int) -> Any:
        index = indexes[blob]
        dtype, shape, start = np.dtype(NUMPY[index["dtypes"][row]]), index["shapes"][row], index["starts"][row]
        data = blobs[blob][start : start + dtype.itemsize * math.prod(shape)]
        return data.view(dtype).reshape(shape)

    def parts(blobs_of: list[int], rows: Any) -> Any:
        rows = rows if isinstance(rows, list) else [rows] * len(blobs_of)
        made = None
        for blob, row in zip(blobs_of, rows, strict=True):
            _, shape, offsets = indexes[blob]["boxes"][str(row)]
            part = tensor(blob, row)
            made = np.zeros(shape, part.dtype) if made is None else made
            made[tuple(slice(at, at + n) for at, n in zip(offsets, part.shape, strict=True))] = part
        return made

    def value(node: Any) -> Any:
        if isinstance(node, list):
            return [value(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$" not in node:
            return {key: value(item) for key, item in node.items()}
        tag, inner = node["$"], node["v"]
        if tag == "tensor":
            return tensor(*inner)
        if tag == "tensors":
            _, names, blob, rows = inner
            numbers = blob if isinstance(blob, list) else [blob] * len(names)
            return {name: tensor(b, row) for name, b, row in zip(names, numbers, rows, strict=True)}
        if tag == "parts":
            return parts(*inner)
        if tag == "parted":
            _, names, sets, numbers, rows = inner
            columns = zip(names, (sets[number] for number in numbers), rows, strict=True)
            return {n: parts(blob, row) if isinstance(blob, list) else tensor(blob, row) for n, blob, row in columns}
        if tag == "ranks":
            return [own[inner] for own in own_values]
        if tag == "tuple":
            return tuple(value(item) for item in inner)
        if tag in ("dict", "ordered"):
            return {value(key): value(item) for key, item in inner}
        if tag == "float":
            return float(inner)
        if tag == "bytes":
            return base64.b64decode(inner)
        return ("value", value(inner))

    own_values = []
    for rank, stored in enumerate(head.get("trees", [])):
        mine = [number for number, blob in enumerate(head["blobs"]) if blob["rank"] == rank]
        everything, everyones = (indexes, blobs), ([indexes[n] for n in mine], [blobs[n] for n in mine])
        indexes, blobs = everyones
        own_values.append(value(json.loads((directory / stored["name"]).read_bytes())))
        indexes, blobs = everything
    return head["step"], value(json.loads((directory / head["tree"]["name"]).read_bytes()))


def test_a_reader_written_from_the_page_alone(tmp_path: Path) -> None:
    weights = {
        "layer.weight": torch.randn(300, 700),
        "layer.half": torch.randn(5, 3).to(torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
    }
    weights["tied"] = weights["layer.weight"]
    state = {
        "model": weights,
        "optimizer": {"state": {0: {"exp_avg": torch.randn(2, 3)}}, "groups": ({"lr": 1e-3},)},
        "odd": [float("inf"), -0.0, b"\x00\xff", None, 10**30, {"$": 1}],
    }
    DirectoryEngine().save(tmp_path / "c", state, step=7, background=False)
    step, found = read(tmp_path / "c")
    assert step == 7
    for name, stored in weights.items():
        expected = stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored
        assert np.array_equal(found["model"][name], expected.numpy())
    assert np.array_equal(found["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"].numpy())
    assert found["optimizer"]["groups"] == ({"lr": 1e-3},)
    assert found["odd"] == state["odd"] and math.copysign(1, found["odd"][1]) == -1


@pytest.mark.parametrize("ranks", [3, 24])
def test_what_several_ranks_saved(tmp_path: Path, ranks: int) -> None:
    """24 are too many for the head. Two saves, of which the second one links and writes a delta."""
    weights = {
        "layer.weight": torch.arange(210_000.0).reshape(300, 700),
        "mask": torch.tensor([True, False]),
        "wide": torch.arange(90_000).reshape(3, 30_000),
    }

    def save(rank: int) -> None:
        engine = DirectoryEngine(threads=1, ranks=Ranks(store, rank, ranks))
        own = PerRank({"rank": rank, "seen": torch.full((2,), rank)})
        mine = {name: tensor.clone() for name, tensor in weights.items()}
        for step in (1, 2):
            mine["mask"] = torch.tensor([step == 1, False])
            state = {"model": mine, "own": own, "one": [mine["layer.weight"]]}
            engine.save(tmp_path / str(step), state, step=step, background=False)
        engine.close()

    store = dist.HashStore()
    with ThreadPoolExecutor(ranks) as threads:
        list(threads.map(save, range(ranks)))
    for number in (1, 2):
        step, found = read(tmp_path / str(number))
        assert step == number and found["model"]["mask"].tolist() == [step == 1, False]
        for name in ("layer.weight", "wide"):
            assert np.array_equal(found["model"][name], weights[name].numpy())
        assert np.array_equal(found["one"][0], weights["layer.weight"].numpy())
        assert [own["rank"] for own in found["own"]] == list(range(ranks))
        assert [own["seen"].tolist() for own in found["own"]] == [[rank] * 2 for rank in range(ranks)]


def test_other_tools_open_the_weights(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    weights = {"a": torch.randn(4, 5), "b": torch.arange(3), "c": torch.randn(2).to(torch.float8_e4m3fn)}
    DirectoryEngine().save(tmp_path / "c", {"model": weights}, background=False)
    loaded = safetensors.load_file(tmp_path / "c" / "model.safetensors")
    assert set(loaded) == set(weights)
    for name in weights:
        assert loaded[name].dtype == weights[name].dtype
        assert torch.equal(loaded[name].view(torch.uint8), weights[name].view(torch.uint8))
