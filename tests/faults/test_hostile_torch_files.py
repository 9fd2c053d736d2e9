"""``.ckpt`` files that would unpack to more than any memory: refused before anything is unpacked."""

from __future__ import annotations

import os
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from milepost.errors import CheckpointError, CheckpointFormatError
from milepost.format import torch_zip
from milepost.plugins.io import TorchCheckpointIO

LARGE = 30_000_000


def repacked(tmp_path: Path, compression: int, pickled: bytes | None = None, **more: bytes) -> Path:
    """A file of torch's, packed anew, with another pickle or with more records."""
    torch.save({"a": torch.ones(3)}, tmp_path / "a.ckpt")
    path = tmp_path / "b.ckpt"
    with zipfile.ZipFile(tmp_path / "a.ckpt") as old, zipfile.ZipFile(path, "w", compression) as new:
        for entry in old.infolist():
            replaced = pickled is not None and entry.filename.endswith("data.pkl")
            new.writestr(entry.filename, pickled if replaced and pickled is not None else old.read(entry))
        for name, data in more.items():
            new.writestr(f"a/{name}", data)
    return path


def readers(path: Path) -> list[Callable[[], object]]:
    def contents() -> object:
        with path.open("rb") as file:
            return torch_zip.contents(file)

    io = TorchCheckpointIO()
    return [lambda: io.verify(path), lambda: io.load_checkpoint(path), contents]


@pytest.mark.parametrize("record", ["milepost/seal", "data.pkl", "data/7"])
def test_records_that_unpack_to_more_than_the_file_are_refused(tmp_path: Path, record: str) -> None:
    text = b"\x80\x02X" + struct.pack("<I", LARGE) + b"a" * LARGE + b"."
    if record == "data.pkl":
        path = repacked(tmp_path, zipfile.ZIP_DEFLATED, text)
    else:
        path = repacked(tmp_path, zipfile.ZIP_DEFLATED, **{record: bytes(LARGE)})
    assert path.stat().st_size < LARGE / 100
    for read in readers(path):
        with pytest.raises(CheckpointFormatError, match="pack it without compression"):
            read()


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02Nr" + struct.pack("<I", 2**31) + b".",
        b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b".",
        b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",
    ],
    ids=["a far place in the memo", "a bytearray", "a text", "a frame"],
)
def test_a_pickle_gets_no_memory_by_its_word(tmp_path: Path, pickled: bytes) -> None:
    path = repacked(tmp_path, zipfile.ZIP_STORED, pickled)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
            for read in readers(path):
                try:
                    read()
                except CheckpointError as error:
                    assert not isinstance(error.__cause__, MemoryError)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_torch_writes_is_never_refused_for_its_sizes(tmp_path: Path) -> None:
    weight = torch.zeros(1000)
    for number, state in enumerate(({}, {"a": weight, "b": weight[:10]}, {str(n): n for n in range(5000)})):
        torch.save(state, tmp_path / f"{number}.ckpt")
        assert TorchCheckpointIO().verify(tmp_path / f"{number}.ckpt") is None
