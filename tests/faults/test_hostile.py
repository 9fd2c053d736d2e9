"""Forged checkpoint directories are refused by an error of Milepost's, in bounded memory, and run nothing.

A sample of the mutations; ``python tests/faults/hostile.py`` makes ten thousand.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import (
    encoded,
    forged,
    genuine,
    genuine_of_ranks,
    head_of,
    lay_out,
    listed,
    live,
    mutations,
    try_all,
    with_head,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost import Checkpointer
from milepost.errors import CheckpointFormatError, MilepostError
from milepost.format import codec, manifest
from milepost.format.manifest import Blob, Stored

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return genuine(tmp_path_factory.mktemp("genuine"))


def test_the_genuine_one_is_read_in_each_way(files: Files, tmp_path: Path) -> None:
    lay_out(with_head(files, encoded(head_of(files))), tmp_path)
    assert try_all(tmp_path) == {"read": 3}


def test_mutations_end_in_an_error_of_ours_or_a_state(tmp_path: Path) -> None:
    ends = mutations(tmp_path, 240, seed=1)
    assert ends.total() == 720 and ends["CheckpointFormatError"] > 300


def edited(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Files], Files]:
    def make(files: Files) -> Files:
        tree = head_of(files) if name == "manifest.json" else json.loads(files[name])
        changed = change(tree)
        return forged(files, name, encoded(tree) if changed is None else changed)

    return make


def _set(*path: Any) -> Callable[[dict[str, Any]], Any]:
    """Put the last of `path` where the others lead."""
    *keys, last, value = path

    def change(tree: Any) -> None:
        for key in keys:
            tree = tree[key]
        tree[last] = value

    return change


def twice(key: str) -> Callable[[dict[str, Any]], bytes]:
    return lambda tree: b'{"' + key.encode() + b'":' + encoded(tree[key]) + b"," + encoded(tree)[1:]


INDEX = "rest.index.json"
TAG = {"$": "value", "v": None}
PICKLE = {"type": "pickle", "path": "p", "value": {"$": "bytes", "v": ""}}
CASES: dict[str, tuple[Callable[[Files], Files], str]] = {
    "a path out of the directory": (edited("manifest.json", _set("tree", "name", "../tree.json")), "plain name"),
    "an absolute path": (edited("manifest.json", _set("blobs", 0, "name", "/etc/passwd")), "plain name"),
    "a file named twice": (edited("manifest.json", _set("blobs", 0, "name", "tree.json")), "twice"),
    "a newer version": (edited("manifest.json", _set("version", 2)), "newer"),
    "a newer index": (edited(INDEX, _set("version", 2)), "newer"),
    "a negative count": (edited("manifest.json", _set("blobs", 0, "saves", -(2**40))), "negative"),
    "a time that is none": (edited("manifest.json", _set("time", 1e300)), "no time"),
    "a metric that is text": (edited("manifest.json", _set("metrics", "loss", "\x1b[2J")), "metric"),
    "a key twice in the head": (edited("manifest.json", twice("step")), "'step' stands twice"),
    "a key twice in an index": (edited(INDEX, twice("starts")), "'starts' stands twice"),
    "a key twice in the tree": (edited("tree.json", twice("model")), "'model' stands twice"),
    "a row beyond the blob": (edited("tree.json", _set("images", {"$": "tensor", "v": [1, 99]})), "row 99"),
    "a blob beyond the head": (edited("tree.json", _set("images", {"$": "tensor", "v": [99, 0]})), "blob 99"),
    "a tree that is a list": (edited("tree.json", lambda _: b"[1,2]"), "holds a list"),
    "a tree in UTF-16": (edited("tree.json", lambda tree: json.dumps(tree).encode("utf-16")), "no tree"),
    "tensors that overlap": (edited(INDEX, _set("starts", 7, 900)), "over another tensor"),
    "a tensor beyond the file": (edited(INDEX, _set("shapes", 0, [2**40])), "outside of the file"),
    "a size that overflows": (edited(INDEX, _set("shapes", 0, [2**61, 2**61, 0])), "has dtype"),
    "a size beyond all numbers": (edited(INDEX, _set("shapes", 0, [2**62 - 1] * 200_000)), "has dtype"),
    "strides that do not fit": (edited(INDEX, _set("strides", {"7": [1, 1, 1, 1]})), "strides"),
    "strides beyond all memory": (edited(INDEX, _set("strides", {"4": [2**61]})), "strides"),
    "strides of a tensor of bytes": (edited(INDEX, _set("strides", {"8": [1]})), "stored as"),
    "another type, too large": (edited(INDEX, _set("stored_as", "8", ["torch.complex128", [2**62] * 9])), "stored as"),
    "a type of no such size": (edited(INDEX, _set("stored_as", "8", ["torch.complex128", [4]])), "stored as"),
    "a number as bytes": (
        edited("tree.json", _set("extra", {**TAG, "v": {"type": "bytearray", "value": 2**40}})),
        "int instead of bytes",
    ),
    "an attribute of torch": (
        edited("tree.json", _set("extra", {**TAG, "v": {"type": "torch.dtype", "value": "_dynamo"}})),
        "no dtype",
    ),
    "an optimizer that is none": (edited("tree.json", _set("optimizer", "param_groups", [[1]])), "state of an opt"),
    "an optimizer without its steps": (
        edited("tree.json", _set("optimizer", "state", "v", 0, 1, "v", 1, 0, "stgp")),
        "AdamW does not take its stored state",
    ),
    "a pickle": (edited("tree.json", _set("extra", {**TAG, "v": PICKLE})), "would run code"),
}  # fmt: skip


@pytest.fixture(scope="module")
def files_of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return genuine_of_ranks(tmp_path_factory.mktemp("of ranks"))


def test_those_of_two_ranks_are_read_in_each_way(files_of_ranks: Files, tmp_path: Path) -> None:
    assert files_of_ranks["tree.json"].count(b'"parts"') == 1, "wide is cut"
    for made in (files_of_ranks, listed(files_of_ranks)):
        lay_out(made, tmp_path)
        assert try_all(tmp_path) == {"read": 3}


CASES_OF_RANKS: dict[str, tuple[Callable[[Files], Files], str]] = {
    "a part that stands twice": (edited("tree.json", _set("wide", "v", [[0, 0], [0, 0]])), "stands twice"),
    "no parts": (edited("tree.json", _set("wide", "v", [[], []])), "no parts"),
    "a part of another blob": (edited("tree.json", _set("wide", "v", [[0, 99], 0])), "blob 99"),
    "values of no rank": (edited("tree.json", _set("own", {"$": "ranks", "v": 7})), "value 7 of 1"),
    "a rank's tree that is a dict": (edited("tree-r00001.json", lambda _: b"{}"), "holds a dict"),
    "a blob of another rank": (
        edited("tree-r00001.json", _set(0, "seen", {"$": "tensor", "v": [3, 0]})),
        "rank 1 has not written",
    ),
    "a rank too many": (edited("manifest.json", _set("world_size", 3)), "2 trees of 3"),
    "a blob of a rank that was not there": (edited("manifest.json", _set("blobs", 0, "rank", 2)), "of rank 2 of 2"),
}  # fmt: skip


@pytest.mark.parametrize("apart", [False, True], ids=["in the head", "listed apart"])
@pytest.mark.parametrize("name", CASES_OF_RANKS)
def test_what_was_forged_of_two_ranks_is_refused_and_named(
    files_of_ranks: Files, tmp_path: Path, name: str, apart: bool
) -> None:
    forge, message = CASES_OF_RANKS[name]
    made = forge(files_of_ranks)
    lay_out(listed(made) if apart else made, tmp_path)
    assert try_all(tmp_path)["read"] <= 2
    with Checkpointer(tmp_path, threads=1) as c, pytest.raises(MilepostError, match=message):
        c.load(1)


def test_parts_that_leave_a_gap_or_overlap_are_refused(files_of_ranks: Files, tmp_path: Path) -> None:
    """Each index is sound by itself: together they are not."""
    names = [name for name in files_of_ranks if name.endswith(".index.json")]
    name, row = next(
        (name, row)
        for name in names
        for row, box in json.loads(files_of_ranks[name]).get("boxes", {}).items()
        if box[2] == [0, 0]
    )
    index = json.loads(files_of_ranks[name])
    whole, rows = index["boxes"][row][0], index["shapes"][int(row)][0]
    for offset, shape, message in ((1, [200, 300], "overlap"), (0, [201, 300], "parts of .* and ")):
        index["names"][int(row)] = f"{whole}[{offset}:{offset + rows},0:300]"
        index["boxes"][row] = [whole, shape, [offset, 0]]
        lay_out(forged(files_of_ranks, name, encoded(index)), tmp_path)
        with Checkpointer(tmp_path, threads=1) as c, pytest.raises(CheckpointFormatError, match=message):
            c.load(1)


@pytest.mark.parametrize("name", CASES)
def test_what_was_forged_is_refused_and_named(files: Files, tmp_path: Path, name: str) -> None:
    forge, message = CASES[name]
    lay_out(forge(files), tmp_path)
    ends = try_all(tmp_path)
    assert ends.total() == 3 and ends["read"] <= 2, "verify reads no values, load knows of no optimizer"
    with Checkpointer(tmp_path, threads=1) as c, pytest.raises(MilepostError, match=message):
        c.restore(live(), 1)


def test_an_array_of_no_bytes_is_as_small_as_its_file(files: Files, tmp_path: Path) -> None:
    form = {"type": "numpy", "dtype": "<U0", "shape": [2**40], "value": {"$": "tensor", "v": [0, 0]}}
    lay_out(edited("tree.json", _set("extra", {**TAG, "v": form}))(files), tmp_path)
    assert try_all(tmp_path)["CheckpointFormatError"] == 2


def test_memory_is_not_asked_for_by_the_word_of_a_file(files: Files, tmp_path: Path) -> None:
    """An index that claims 256 GiB, with a digest for each piece: the process may have 4 GiB more than it has."""
    size = 1 << 38

    def claim(index: dict[str, Any]) -> None:
        index.update(bytes=size, digests="0" * 32 * manifest.piece_count(size))
        index["shapes"][-1] = [size - index["starts"][-1]]
        index["stored_as"].clear()

    made = edited(INDEX, claim)(files)
    head = head_of(made)
    head["blobs"][1]["bytes"] = size
    lay_out(with_head(made, encoded(head)), tmp_path)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30),) * 2)
            code = 0 if try_all(tmp_path) == {"CheckpointCorruptError": 3} else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("name", ["manifest.json", "tree.json", INDEX, "rest.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "link", "directory", "device", "gone"])
def test_files_that_are_none_are_refused_without_waiting(files: Files, tmp_path: Path, name: str, kind: str) -> None:
    lay_out(files, tmp_path)
    path = tmp_path / "step-00000001" / name
    path.rename(tmp_path / "outside")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind in ("link", "device"):
        path.symlink_to(tmp_path / "outside" if kind == "link" else "/dev/zero")
    elif kind == "directory":
        path.mkdir()
    ends = try_all(tmp_path)
    assert ends.total() == 3 and ends["read"] == 0


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 1_000_000, b'{"a":' * 500_000, b'{"$":"tuple","v":[' * 100 + b"]}" * 100,
        b'"' + b'\\"' * 1_000_000 + b"\\", b'["' * 500_000, b'{"a":' + b"1" * 5000 + b"}", b"\xff\xfe[", b"",
    ],
    ids=lambda data: repr(data[:12]),
)  # fmt: skip
def test_deep_and_endless_text_is_refused_in_linear_time(data: bytes) -> None:
    """Escaped quotes without an end took time that grows with the square: the pattern began anew at each."""
    with pytest.raises(CheckpointFormatError):
        codec.decode(data, "tree.json")
    for kind in (Stored, manifest.Index, manifest.Head):
        with pytest.raises(CheckpointFormatError):
            manifest._decode(data, kind, "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["tensor", "dict"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["$", "v", "a", "type", "value"]) | st.text(max_size=3), inner, max_size=3)
        | st.fixed_dictionaries(
            {"$": st.sampled_from(["tensor", "tuple", "dict", "ordered", "float", "bytes", "value", "key"]), "v": inner}
        )
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None, database=None)
@given(JSON | st.binary(max_size=40))
def test_any_tree_is_a_tree_or_a_format_error(value: Any) -> None:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    try:
        tree = codec.decode(data, "tree.json")
    except CheckpointFormatError:
        return
    assert codec.decode(codec.encode(tree), "tree.json") is not None or tree is None


COLUMNS = st.fixed_dictionaries(
    {
        "version": st.just(1), "bytes": st.integers(-1, 300), "names": st.lists(st.text(max_size=2), max_size=3),
        "dtypes": st.lists(st.sampled_from(["F32", "U8", "C64", "X"]), max_size=3),
        "shapes": st.lists(st.lists(st.integers(-1, 2**63), max_size=3), max_size=3),
        "starts": st.lists(st.integers(-1, 300), max_size=3),
        "strides": st.dictionaries(st.sampled_from(["0", "1", "01", "x"]), st.lists(st.integers(-1, 9), max_size=3)),
        "stored_as": st.dictionaries(
            st.sampled_from(["0", "1"]), st.tuples(st.just("torch.complex128"), st.lists(st.integers(-1, 9)))
        ),
        "digests": st.sampled_from(["", "0" * 32]),
    }
)  # fmt: skip


@settings(max_examples=300, deadline=None, database=None)
@given(COLUMNS)
def test_any_index_lies_in_its_blob_or_is_a_format_error(columns: dict[str, Any]) -> None:
    data = encoded(columns)
    stored = Stored("x.index.json", len(data), manifest.digest(data))
    try:
        index = manifest.decode_index(data, stored, Blob("x", columns["bytes"], stored, "x"), "x.index.json")
    except CheckpointFormatError:
        return
    assert all(8 <= entry.start <= entry.stop <= index.bytes for entry in index.entries())
