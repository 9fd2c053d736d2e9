"""torch's zip file written by the engine: what torch, zip tools and the seal say of it."""

from __future__ import annotations

import io
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from milepost.engine import torch_file, values
from milepost.engine.requests import CHUNK_BYTES
from milepost.format import sealed
from milepost.plugins import TorchCheckpointIO

MIB = 1 << 20


def states() -> dict[str, Any]:
    big = torch.randn(9 * MIB + 17)  # a record over three chunks
    return {
        "several chunks": {"a": torch.randn(1001), "big": big, "tied": big, "view": big[5:99:2], "b": torch.randn(MIB)},
        "small": {"w": torch.ones(3), "n": [1, {"deep": torch.zeros(2, 2)}], "empty": torch.empty(0, 3)},
        "no tensor": {"a": 1},
        "every type": {
            str(t): torch.ones(5).to(t)
            for t in (torch.bfloat16, torch.bool, torch.int8, torch.float8_e5m2, torch.uint16, torch.complex64)
        },
        "parameters": {"p": torch.nn.Parameter(torch.randn(4)), "order": torch.nn.Linear(3, 2).state_dict()},
    }


@pytest.mark.parametrize("name", list(states()))
def test_torch_and_zip_tools_find_it_sound(tmp_path: Path, name: str) -> None:
    state = states()[name]
    assert torch_file.image_of(state) is not None
    path = tmp_path / "a.ckpt"
    TorchCheckpointIO().save_checkpoint(state, path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with path.open("rb") as file:
        assert sealed.verify(file, str(path))
    for options in ({}, {"mmap": True}):
        assert_equal(torch.load(path, weights_only=True, **options), state)
    if "tied" in state:
        loaded = torch.load(path, weights_only=True)
        assert loaded["tied"].data_ptr() == loaded["big"].data_ptr()
        assert loaded["view"].untyped_storage().data_ptr() == loaded["big"].untyped_storage().data_ptr()
        assert path.stat().st_size < 1.01 * (state["big"].nbytes + state["b"].nbytes + 5000)


@pytest.mark.parametrize("name", list(states()))
def test_it_is_what_torch_itself_writes(tmp_path: Path, name: str) -> None:
    assert_as_torch_writes(states()[name], tmp_path)


def assert_as_torch_writes(state: Any, folder: Path) -> None:
    """Record for record, the checksums too; the seal is added, and an identifier is of the archive without tensors."""
    path, theirs = folder / "a.ckpt", io.BytesIO()
    TorchCheckpointIO(allow_pickle=True).save_checkpoint(state, path)
    torch.save(values.to_plain(state, warn=False), theirs)
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(theirs) as other:
        mine = {i.filename.split("/", 1)[1]: (ours.read(i), i.CRC) for i in ours.infolist()}
        expected = {i.filename.split("/", 1)[1]: (other.read(i), i.CRC) for i in other.infolist()}
    assert set(mine) - set(expected) == {"milepost/seal"}
    assert {r for r, content in expected.items() if mine[r] != content} <= {".data/serialization_id"}


class Holder:
    def __init__(self, tensor: torch.Tensor | None) -> None:
        self.tensor = tensor


def hidden() -> dict[str, tuple[dict[str, Any], bool]]:
    """States in which tensors may be where a walk through the containers does not see them; and whether they are."""
    w, x, attributed = torch.ones(4), torch.zeros(4), nn.Parameter(torch.full((4,), 2.0))
    attributed.average = w  # type: ignore[attr-defined]  # pickled with the parameter, before `x`
    on_dict = OrderedDict(x=x)
    on_dict._metadata = {"kept": w}  # type: ignore[attr-defined]
    return {
        "in an object": ({"odd": Holder(w), "x": x, "w": w}, True),
        "on a parameter": ({"p": attributed, "x": x, "w": w}, True),
        "in a set": ({"s": {w}, "x": x, "w": w}, True),
        "on a dict": ({"d": on_dict, "w": w}, False),
        "an object without": ({"odd": Holder(None), "x": x, "w": w}, False),
        "many times": ({"w": w, "again": [w, (w, {"x": x})], "view": w[1:], "x": x, "none": torch.empty(0)}, False),
    }


@pytest.mark.parametrize("name", list(hidden()))
def test_no_record_gets_the_bytes_of_another(tmp_path: Path, name: str) -> None:
    state, through_torch = hidden()[name]
    assert (torch_file.image_of(values.to_plain(state, warn=False)) is None) == through_torch
    assert_as_torch_writes(state, tmp_path)


def test_every_byte_is_read_once_for_its_checksum(tmp_path: Path) -> None:
    """But for what another thread has in hand when the end of a record is written: none, where one thread writes."""
    state = states()["several chunks"]
    image = torch_file.image_of(state)
    assert image is not None
    buffer = memoryview(bytearray(CHUNK_BYTES))
    chunks = [
        bytes(image.view(start, min(start + CHUNK_BYTES, image.size), buffer))
        for start in range(0, image.size, CHUNK_BYTES)
    ]
    assert image.bytes_read_again == 0 and len(chunks) > 2
    late = torch_file.image_of(state)
    assert late is not None
    for number in reversed(range(len(chunks))):  # the end of the record first: all that is before it is read for it
        start = number * CHUNK_BYTES
        found = bytes(late.view(start, min(start + CHUNK_BYTES, image.size), buffer))
        assert found == chunks[number]
    assert 0 < late.bytes_read_again < image.size


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert found.reshape(-1).tolist() == expected.detach().reshape(-1).tolist()
    elif isinstance(expected, dict):
        for key in expected:
            assert_equal(found[key], expected[key])
    else:
        assert (
            [type(v) for v in found] == [type(v) for v in expected] if isinstance(expected, list) else found == expected
        )


@pytest.mark.parametrize("odd", [torch.ones(3).to_sparse(), torch.ones(2, device="meta")])
def test_what_cannot_be_laid_out_goes_through_torch(tmp_path: Path, odd: torch.Tensor) -> None:
    state = {"odd": odd, "w": torch.ones(3)}
    assert torch_file.image_of(state) is None
    TorchCheckpointIO().save_checkpoint(state, tmp_path / "a.ckpt")
    assert torch.equal(torch.load(tmp_path / "a.ckpt", weights_only=True)["w"], state["w"])


def test_a_tensor_inside_a_pickled_object_goes_through_torch(tmp_path: Path) -> None:
    holder = Holder(torch.arange(5))
    assert torch_file.image_of({"odd": holder, "w": torch.ones(3)}) is None
    TorchCheckpointIO(allow_pickle=True).save_checkpoint({"odd": holder, "w": torch.ones(3)}, tmp_path / "a.ckpt")
    assert torch.equal(torch.load(tmp_path / "a.ckpt", weights_only=False)["odd"].tensor, torch.arange(5))
