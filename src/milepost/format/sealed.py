"""torch's zip file with a seal: digests of every byte, in a record and in the archive's comment that torch ignores.

Layout: ``[zip entries by torch.save][entry milepost/seal][central directory][end record][comment]``. The seal holds one
128-bit digest for each MiB of all bytes before its own entry, made while they are written. The comment, ``milepost1:``
and 32 hexadecimal digits, is the digest of everything from the seal's entry up to the comment. Files without a seal
(torch's, Lightning's) are checked by their zip checksums, which `torch.load` itself does not look at.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any

import xxhash

from milepost.errors import CheckpointCorruptError, CheckpointError, CheckpointFormatError
from milepost.format.torch_zip import check_sizes, tensors_of_records

PIECE_BYTES = 1 << 20
_VERSION = 1
_SEAL = "milepost/seal"
_MARK = b"milepost1:"
_COMMENT_BYTES = len(_MARK) + 32
_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch before 1.6 begin: nothing checks those
_NAMED_AT_MOST = 5
Span = tuple[int, int]

# ---- writing -----------------------------------------------------------------------------------------------------


def write(file: IO[bytes], save: Callable[[Any], None]) -> None:
    """Let `save` write a zip archive into `file`, then seal it. `file` is empty, readable and seekable.

    The digests are of the bytes that `save` handed over, not of what the disk gives back: damage on the way to it is
    found by `verify` and is not sealed in. `save` may only append, as torch's writer does.

    Raises:
        OSError: what has been written is not what `file` gives back.
    """
    through = _Digesting(file)
    save(through)
    file.flush()
    start, head, directory = _read_back(file, through)
    whole = start // PIECE_BYTES
    covered = through.digests[:whole] + ([_digest(head)] if head else [])
    file.seek(start)
    file.write(tail(start, directory, covered))


def tail(start: int, directory: bytes, digests: list[str]) -> bytes:
    """What stands from `start` to the end of a sealed file.

    Args:
        start: where the archive's own directory was to begin; the bytes before it have these `digests`.
        directory: from there to the end of the unsealed archive.
    """
    end = _Tail(start, directory)
    with zipfile.ZipFile(end, "a", zipfile.ZIP_STORED) as archive:
        entry = zipfile.ZipInfo(f"{archive.namelist()[0].split('/')[0]}/{_SEAL}")
        seal = {"version": _VERSION, "piece_bytes": PIECE_BYTES, "length": start, "xxh3_128": digests}
        archive.writestr(entry, json.dumps(seal))  # goes where the directory was
        archive.comment = bytes(_COMMENT_BYTES)
    content = end.getvalue()[:-_COMMENT_BYTES]
    return content + _MARK + _digest(content).encode()


class _Digesting:
    """A file that can only be appended to; knows the digest of each piece that went through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._piece = xxhash.xxh3_128()
        self._room = PIECE_BYTES
        self._ended: list[str] = []
        self.length = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self.length += len(view)
        begin = 0
        while begin < len(view):
            part = view[begin : begin + self._room]
            self._piece.update(part)
            begin += len(part)
            self._room -= len(part)
            if self._room == 0:
                self._ended.append(self._piece.hexdigest())
                self._piece, self._room = xxhash.xxh3_128(), PIECE_BYTES
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    @property
    def digests(self) -> list[str]:
        """Of every piece so far, the last one as far as it goes."""
        return self._ended + ([self._piece.hexdigest()] if self._room < PIECE_BYTES else [])


class _Tail(io.BytesIO):
    """The end of a file, in memory, at the positions that it has in the file."""

    def __init__(self, start: int, content: bytes) -> None:
        super().__init__(content)
        self._start = start

    def seek(self, position: int, whence: int = io.SEEK_SET, /) -> int:
        return super().seek(position - self._start if whence == io.SEEK_SET else position, whence) + self._start

    def tell(self) -> int:
        return super().tell() + self._start


def _read_back(file: IO[bytes], through: _Digesting) -> tuple[int, bytes, bytes]:
    """Where the directory starts, the part of a piece before it, and the directory: bytes that are known to be good."""
    error: Exception | None = None
    start = through.length
    try:
        with zipfile.ZipFile(file) as archive:
            start = archive.start_dir
    except Exception as failed:  # a damaged directory can fail in any way inside zipfile
        error = failed
    begin = start // PIECE_BYTES * PIECE_BYTES
    file.seek(begin)
    content = file.read()
    found = [_digest(content[i : i + PIECE_BYTES]) for i in range(0, len(content), PIECE_BYTES)]
    if error or begin + len(content) != through.length or found != through.digests[begin // PIECE_BYTES :]:
        raise OSError(
            f"of the {through.length} bytes written, those from {begin} on are not read back as they were written"
        ) from error
    return start, content[: start - begin], content[start - begin :]


# ---- verifying ---------------------------------------------------------------------------------------------------


def verify(file: IO[bytes], name: str) -> bool:
    """Check every byte of `file`. Returns False for what carries no checksums: a file of torch before 1.6.

    Raises:
        CheckpointCorruptError: names the first damaged range of bytes, and the tensors that are damaged.
        CheckpointFormatError: the seal is of a later version.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _COMMENT_BYTES))
    comment = file.read()
    try:
        with zipfile.ZipFile(file) as archive:
            try:
                check_sizes(archive)
            except CheckpointFormatError:
                if not comment.startswith(_MARK):
                    raise
                raise _corrupt(name, (0, size), "the directory of its records") from None
            seal = _read_seal(archive, name)
            if seal is None and comment.startswith(_MARK):
                raise _corrupt(name, (0, size), "the directory of its records")
            if seal is None:
                _verify_checksums(archive, name)
                return True
            start, expected = seal
            if comment != _MARK + _digest_of(file, start, size - _COMMENT_BYTES).encode():
                raise _corrupt(name, (start, size), "the digests themselves")
            damaged = [span for span, digest in expected if _digest_of(file, *span) != digest]
            if damaged:
                raise _corrupt(name, damaged[0], *_what_is_damaged(archive, damaged, start))
            return True
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive can fail in any way inside zipfile
        file.seek(0)
        if isinstance(error, zipfile.BadZipFile) and file.read(len(_BEFORE_ZIP)) == _BEFORE_ZIP:
            return False
        raise CheckpointCorruptError(
            f"{name} is damaged: {error}. Resume from an older one.", path=name, byte_range=(0, size)
        ) from error


def _read_seal(archive: zipfile.ZipFile, name: str) -> tuple[int, list[tuple[Span, str]]] | None:
    """Where the seal's entry starts, and the digest of each piece before it; None where there is no seal."""
    entry = next((i for i in archive.infolist() if i.filename.endswith("/" + _SEAL)), None)
    if entry is None:
        return None
    seal = json.loads(archive.read(entry))
    if seal["version"] != _VERSION:
        raise CheckpointFormatError(
            f"{name} has a seal of version {seal['version']!r}; this version of Milepost reads version {_VERSION}."
            " Update Milepost to read it."
        )
    start, piece, digests = seal["length"], seal["piece_bytes"], seal["xxh3_128"]
    if start != entry.header_offset or piece < 1 or -(-start // piece) != len(digests):
        raise ValueError("its digests do not cover it")
    return start, [((i * piece, min((i + 1) * piece, start)), digest) for i, digest in enumerate(digests)]


def _verify_checksums(archive: zipfile.ZipFile, name: str) -> None:
    damaged = [entry for entry in archive.infolist() if not _checksum_holds(archive, entry)]
    if damaged:
        end = damaged[0].header_offset + damaged[0].file_size
        raise _corrupt(name, (damaged[0].header_offset, end), *_name(archive, damaged))


def _what_is_damaged(archive: zipfile.ZipFile, damaged: list[Span], start: int) -> tuple[str, str | None]:
    """A piece may hold many records: their own checksums tell which of them are damaged."""
    entries = sorted((e for e in archive.infolist() if e.header_offset < start), key=lambda e: e.header_offset)
    ends = [*(e.header_offset for e in entries[1:]), start]
    touched = [
        entry
        for entry, end in zip(entries, ends, strict=True)
        if any(entry.header_offset < stop and end > begin for begin, stop in damaged)
    ]
    bad = [entry for entry in touched if not _checksum_holds(archive, entry)]
    if not bad:
        return f"what lies between the records {_listed([e.filename for e in touched])}", None
    return _name(archive, bad)


def _name(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> tuple[str, str | None]:
    owners = tensors_of_records(archive)
    tensors = [path for entry in entries for path in owners.get(entry.filename, ())]
    if tensors:
        return f"the tensors {_listed(tensors)}" if len(tensors) > 1 else f"the tensor {tensors[0]!r}", tensors[0]
    return f"the records {_listed([e.filename for e in entries])}", None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(map(repr, names[:_NAMED_AT_MOST])) + more


def _checksum_holds(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(entry) as record:
            while record.read(PIECE_BYTES):
                pass
    except Exception:  # its header or its bytes
        return False
    return True


def _corrupt(name: str, span: Span, what: str, tensor: str | None = None) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        f"{name} is damaged in bytes {span[0]} to {span[1]}, in {what}. Resume from an older checkpoint:"
        " ckpt_path='last' passes over damaged ones.",
        path=name,
        tensor=tensor,
        byte_range=span,
    )


def _digest(content: bytes) -> str:
    return str(xxhash.xxh3_128_hexdigest(content))


def _digest_of(file: IO[bytes], begin: int, end: int) -> str:
    file.seek(begin)
    digest = xxhash.xxh3_128()
    for part in _parts(file, end - begin):
        digest.update(part)
    return str(digest.hexdigest())


def _parts(file: IO[bytes], length: int) -> Iterator[bytes]:
    while length > 0 and (part := file.read(min(PIECE_BYTES, length))):
        length -= len(part)
        yield part
