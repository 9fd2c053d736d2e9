"""The seal: made from the bytes as they were written, finds every damage, names the tensors."""

from __future__ import annotations

import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from milepost.errors import CheckpointCorruptError, CheckpointFormatError
from milepost.format import sealed, torch_zip

PIECE = sealed.PIECE_BYTES


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    tied = torch.randn(5)
    return {
        "epoch": 1,
        "state_dict": {f"layer.{n}": torch.randn(n + 3) for n in range(20)}
        | {"large": torch.randn(700_000), "tied": tied, "again": tied, "after": torch.nn.Parameter(torch.randn(2))},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(9)}}}],
    }


def sealed_bytes(tree: Any = None) -> bytes:
    file = io.BytesIO()
    sealed.write(file, lambda out: torch.save(state() if tree is None else tree, out))
    return file.getvalue()


@pytest.fixture(scope="module")
def whole() -> bytes:
    return sealed_bytes()


def error_of(content: bytes) -> CheckpointCorruptError:
    with pytest.raises(CheckpointCorruptError) as caught:
        sealed.verify(io.BytesIO(content), "a.ckpt")
    return caught.value


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :]


def spans_of_data(content: bytes) -> dict[str, tuple[int, int]]:
    """First and last position of the bytes of each record."""
    found = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            name, extra = content[entry.header_offset + 26 :][:2], content[entry.header_offset + 28 :][:2]
            begin = entry.header_offset + 30 + int.from_bytes(name, "little") + int.from_bytes(extra, "little")
            found[entry.filename] = (begin, begin + entry.file_size)
    return found


def test_a_whole_file_is_good_and_the_same_content_gives_the_same_bytes(whole: bytes) -> None:
    assert sealed.verify(io.BytesIO(whole), "a.ckpt") is True
    assert sealed_bytes() == whole
    assert zipfile.ZipFile(io.BytesIO(whole)).testzip() is None
    loaded = torch.load(io.BytesIO(whole), weights_only=True)
    assert torch.equal(loaded["state_dict"]["large"], state()["state_dict"]["large"])


def test_the_digests_are_those_that_reading_the_file_gives(whole: bytes) -> None:
    import xxhash

    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        seal = json.loads(archive.read(next(n for n in archive.namelist() if n.endswith("milepost/seal"))))
    covered = whole[: seal["length"]]
    pieces = [covered[i : i + PIECE] for i in range(0, len(covered), PIECE)]
    assert len(pieces) == 3 and seal["xxh3_128"] == [xxhash.xxh3_128_hexdigest(p) for p in pieces]


@pytest.mark.parametrize("damaged_value", ["ends in a storage", "begins in a storage"])
def test_every_tensor_is_named_by_key_path_and_byte_range(whole: bytes, damaged_value: str) -> None:
    spans = spans_of_data(whole)
    tree = state()
    named: set[str] = set()
    for record, (begin, end) in spans.items():
        if "/data/" not in record:
            continue
        position = end - 1 if damaged_value.startswith("ends") else begin
        error = error_of(flipped(whole, position))
        assert error.tensor is not None and repr(error.tensor) in str(error), record
        assert error.byte_range is not None and error.byte_range[0] <= position < error.byte_range[1]
        assert f"bytes {error.byte_range[0]} to {error.byte_range[1]}" in str(error)
        named.add(error.tensor)
        if error.tensor == "state_dict.tied":
            assert "'state_dict.again'" in str(error)
        else:
            assert str(error).count("state_dict.") + str(error).count("optimizer_states.") == 1, str(error)
    expected = {f"state_dict.{key}" for key in tree["state_dict"] if key != "again"}
    assert named == expected | {"optimizer_states.0.state.0.step", "optimizer_states.0.state.0.exp_avg"}


def test_the_record_named_holds_the_tensor_named(whole: bytes) -> None:
    """The number of a record says nothing of the order of the keys: compare the values."""
    tree, spans = state(), spans_of_data(whole)
    for key, tensor in tree["state_dict"].items():
        raw = tensor.detach().numpy().tobytes()
        position = whole.index(raw)
        assert any(begin == position for begin, _ in spans.values())
        assert error_of(flipped(whole, position)).tensor == f"state_dict.{'tied' if key == 'again' else key}"


def test_several_damaged_tensors_are_all_named(whole: bytes) -> None:
    tree = state()["state_dict"]
    content = whole
    for key in ("layer.2", "after"):
        content = flipped(content, whole.index(tree[key].detach().numpy().tobytes()))
    assert "the tensors 'state_dict.layer.2', 'state_dict.after'" in str(error_of(content))


def test_damage_outside_every_tensor_is_named_as_that(whole: bytes) -> None:
    spans = spans_of_data(whole)
    pickle_begin, _ = next(span for name, span in spans.items() if name.endswith("data.pkl"))
    error = error_of(flipped(whole, pickle_begin + 40))
    assert error.tensor is None and "data.pkl" in str(error)
    large = next(begin for name, (begin, end) in spans.items() if end - begin > PIECE)
    error = error_of(flipped(whole, large - 1))  # the padding before it
    assert error.tensor is None or "large" in error.tensor
    assert error_of(flipped(whole, len(whole) - 1)).tensor is None


def test_a_file_cut_anywhere_is_found(whole: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        edges = {0, PIECE, 2 * PIECE, archive.start_dir, len(whole) - 64, len(whole) - 42, len(whole)}
        edges |= {entry.header_offset for entry in archive.infolist()}
    edges |= {edge for span in spans_of_data(whole).values() for edge in span}
    for edge in edges:
        for length in {max(0, edge - 1), edge, edge + 1}:
            if length < len(whole):
                error_of(whole[:length])


def test_a_page_of_zeros_is_found(whole: bytes) -> None:
    for begin in range(0, len(whole), 4096):
        content = whole[:begin] + bytes(min(4096, len(whole) - begin)) + whole[begin + 4096 :]
        if content != whole:
            error_of(content)


def test_what_is_appended_prepended_or_of_another_file_is_found(whole: bytes) -> None:
    error_of(whole + b"x")
    error_of(whole + whole)
    error_of(b"x" + whole)
    tree = state()
    tree["state_dict"]["large"] += 1
    other = sealed_bytes(tree)
    assert len(other) == len(whole)
    for cut in (PIECE, 2 * PIECE, len(whole) - 42, len(whole) // 3):
        error_of(whole[:cut] + other[cut:])
    swapped = whole[PIECE : 2 * PIECE] + whole[:PIECE] + whole[2 * PIECE :]
    error_of(swapped)


class Disk(io.BytesIO):
    """A disk that damages one byte of what is written to it."""

    def __init__(self, position: int) -> None:
        super().__init__()
        self.position = position

    def write(self, data: Any, /) -> int:
        begin = self.tell()
        content = bytearray(data)
        if begin <= self.position < begin + len(content):
            content[self.position - begin] ^= 1
        return super().write(content)


def test_damage_on_the_way_to_the_disk_is_not_sealed_in(whole: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        seal = max(entry.header_offset for entry in archive.infolist())
    generator = random.Random(0)
    for position in [0, 100, PIECE - 1, PIECE, seal - 1, *(generator.randrange(len(whole)) for _ in range(60))]:
        disk = Disk(position)
        try:
            sealed.write(disk, lambda out: torch.save(state(), out))
        except OSError as error:
            assert "read back" in str(error)
            continue
        content = disk.getvalue()
        assert content != whole
        error_of(content)


def test_a_writer_that_seeks_back_is_refused() -> None:
    def seeks(out: Any) -> None:
        out.write(b"x")
        out.seek(0)

    with pytest.raises(AttributeError):
        sealed.write(io.BytesIO(), seeks)


def resealed(change: Any) -> bytes:
    """A file whose seal is edited and whose comment fits it: as somebody with a hex editor and patience makes one."""
    file = io.BytesIO()
    torch.save({"w": torch.ones(3)}, file)
    with zipfile.ZipFile(file, "a") as archive:
        start = archive.start_dir
        seal: Any = {"version": 1, "piece_bytes": PIECE, "length": start, "xxh3_128": ["0" * 32]}
        archive.writestr("archive/milepost/seal", json.dumps(change(seal)))
        archive.comment = bytes(42)
    content = file.getvalue()[:-42]
    return content + b"milepost1:" + sealed._digest(content[start:]).encode()


@pytest.mark.parametrize(
    "change",
    [
        lambda seal: {},
        lambda seal: [],
        lambda seal: 7,
        lambda seal: seal | {"length": -5},
        lambda seal: seal | {"length": 10**30},
        lambda seal: seal | {"length": "many"},
        lambda seal: seal | {"length": 0, "xxh3_128": []},
        lambda seal: seal | {"piece_bytes": 0},
        lambda seal: seal | {"piece_bytes": -1},
        lambda seal: seal | {"piece_bytes": None},
        lambda seal: seal | {"xxh3_128": []},
        lambda seal: seal | {"xxh3_128": "0"},
        lambda seal: seal | {"xxh3_128": [None]},
        lambda seal: seal,
    ],
)
def test_a_seal_made_by_hand_is_never_another_error(change: Any) -> None:
    error_of(resealed(change))


def test_a_seal_of_a_later_version_says_so() -> None:
    with pytest.raises(CheckpointFormatError, match=r"version 2.*Update Milepost"):
        sealed.verify(io.BytesIO(resealed(lambda seal: seal | {"version": 2})), "a.ckpt")


def test_torchs_own_file_is_checked_by_its_checksums_and_the_tensor_named(tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save(state(), file)
    content = file.getvalue()
    assert sealed.verify(io.BytesIO(content), "a") is True
    position = content.index(state()["state_dict"]["layer.7"].numpy().tobytes())
    assert error_of(flipped(content, position)).tensor == "state_dict.layer.7"


def test_a_file_of_old_torch_cannot_be_verified() -> None:
    file = io.BytesIO()
    torch.save({"w": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    assert sealed.verify(file, "a") is False
    error_of(b"\x80\x02}q\x00.")


def test_a_pickle_that_nests_its_objects_without_end_is_walked_once() -> None:
    calls = b"".join(
        b"cforeign\nThing\n(h" + bytes([n]) + b"h" + bytes([n]) + b"tRq" + bytes([n + 1]) for n in range(60)
    )
    pickled = b"\x80\x02cforeign\nThing\n)Rq\x00" + calls + b"."
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    with zipfile.ZipFile(file) as archive:
        assert torch_zip.tensors_of_records(archive) == {}
    assert torch_zip.refused_value(file) == ("", "foreign.Thing")
