"""torch's zip file with a seal: digests of every byte, in a record and in the archive's comment that torch ignores.

Layout: ``[zip entries by torch.save][entry milepost/seal][central directory][end record][comment]``. The seal holds one
128-bit digest for each MiB of all bytes before its own entry. The comment, ``milepost1:`` and 32 hexadecimal digits, is
the digest of everything from the seal's entry up to the comment. Files without a seal (torch's, Lightning's) are
checked by their zip checksums, which `torch.load` itself does not look at.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any

import xxhash

from milepost.errors import CheckpointCorruptError

PIECE_BYTES = 1 << 20
_SEAL = "milepost/seal"
_MARK = b"milepost1:"
_COMMENT_BYTES = len(_MARK) + 32


def write(file: IO[bytes], save: Callable[[IO[bytes]], None]) -> None:
    """Let `save` write a zip archive into `file`, then seal it. `file` is empty, readable and seekable."""
    save(file)
    file.flush()
    with zipfile.ZipFile(file, "a", zipfile.ZIP_STORED) as archive:
        start = archive.start_dir  # the seal's entry goes where the directory was
        covered = _digests_of(file, start)
        prefix = archive.namelist()[0].split("/")[0]
        archive.writestr(
            f"{prefix}/{_SEAL}",
            json.dumps({"version": 1, "piece_bytes": PIECE_BYTES, "length": start, "xxh3_128": covered}),
        )
        archive.comment = _MARK + b"0" * 32
    file.seek(0, io.SEEK_END)
    end = file.tell() - _COMMENT_BYTES
    digest = _digest_range(file, start, end)
    file.seek(end)
    file.write(_MARK + digest.encode())


def verify(file: IO[bytes], name: str) -> None:
    """Check every byte of `file`.

    Raises:
        CheckpointCorruptError: names the first damaged range of bytes, and the record of the archive it lies in.
    """
    file.seek(0, io.SEEK_END)
    size = file.tell()
    file.seek(max(0, size - _COMMENT_BYTES))
    comment = file.read()
    try:
        with zipfile.ZipFile(file) as archive:
            seals = [i for i in archive.infolist() if i.filename.endswith("/" + _SEAL)]
            if not seals and comment.startswith(_MARK):
                raise _corrupt(name, (0, size), "the directory of its records")
            if not seals:
                _verify_zip(archive, name)
                return
            seal = json.loads(archive.read(seals[0]))
            entries = archive.infolist()
        start = int(seal["length"])
        if not comment.startswith(_MARK) or comment[len(_MARK) :].decode() != _digest_range(
            file, start, size - _COMMENT_BYTES
        ):
            raise _corrupt(name, (start, size), "the digests themselves")
    except CheckpointCorruptError:
        raise
    except Exception as error:  # a damaged archive can fail in any way inside zipfile
        raise CheckpointCorruptError(
            f"{name} is damaged: {error}. Resume from an older one.", path=name, byte_range=(0, size)
        ) from error
    for index, (expected, found) in enumerate(zip(seal["xxh3_128"], _digests_of(file, start), strict=True)):
        if expected != found:
            begin, stop = index * PIECE_BYTES, min((index + 1) * PIECE_BYTES, start)
            touched = [i.filename for i in entries if i.header_offset < stop and i.header_offset + i.file_size > begin]
            raise _corrupt(name, (begin, stop), f"the records {touched[:5]}")


def _verify_zip(archive: zipfile.ZipFile, name: str) -> None:
    if (bad := archive.testzip()) is not None:
        info = archive.getinfo(bad)
        raise _corrupt(name, (info.header_offset, info.header_offset + info.file_size), f"the record {bad!r}")


def _corrupt(name: str, span: tuple[int, int], what: str) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        f"{name} is damaged in bytes {span[0]} to {span[1]}, in {what}. Resume from an older checkpoint:"
        " ckpt_path='last' passes over damaged ones.",
        path=name,
        tensor=what,
        byte_range=span,
    )


def _digests_of(file: IO[bytes], length: int) -> list[str]:
    file.seek(0)
    digests = []
    for begin in range(0, length, PIECE_BYTES):
        digests.append(xxhash.xxh3_128_hexdigest(file.read(min(PIECE_BYTES, length - begin))))
    return digests


def _digest_range(file: IO[bytes], begin: int, end: int) -> str:
    file.seek(begin)
    return str(xxhash.xxh3_128_hexdigest(file.read(end - begin)))


class _Inert:
    """Stands for anything a pickle names that is not plain. Building it runs nothing."""

    _name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


_PLAIN = {("collections", "OrderedDict"): OrderedDict}  # no dict: state_dict() hangs _metadata on it


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[(module, name)]
        harmless = module == "torch" or module.startswith(("torch._utils", "torch.storage"))
        return type("Inert", (_Inert,), {"_name": "" if harmless else f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return None


def refused_value(file: IO[bytes]) -> tuple[str, str] | None:
    """Key path and type of the first value in a torch file that is not plain data, found without running its code."""
    try:
        with zipfile.ZipFile(file) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            tree = _InertUnpickler(io.BytesIO(archive.read(name))).load()
    except Exception:  # a hostile or foreign pickle may fail anywhere; the caller then reports torch's own refusal
        return None
    return _find_inert(tree, "", set())


def _find_inert(value: Any, path: str, seen: set[int]) -> tuple[str, str] | None:
    if isinstance(value, _Inert) or (isinstance(value, type) and issubclass(value, _Inert)):
        return (path, value._name) if value._name else None
    if id(value) in seen:
        return None
    seen.add(id(value))
    items: Any = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple, set)) else ()
    )
    for key, item in items:
        if found := _find_inert(item, f"{path}.{key}" if path else str(key), seen):
            return found
    return None
