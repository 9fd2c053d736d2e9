"""Where things lie in a zip archive whose records are stored as they are: enough to write their bytes from elsewhere.

Pure: no torch. torch's writer can leave out the records' bytes (``torch.serialization.skip_data``); what it leaves
is the archive with holes, and checksums of 0 behind each hole and in the directory.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Sequence
from typing import IO, NamedTuple

_LOCAL = struct.Struct("<4s5H3I2H")
_DESCRIPTOR_MARK = b"PK\x07\x08"
_CENTRAL_MARK = b"PK\x01\x02"
_CENTRAL_BYTES = 46
_CENTRAL_CRC = 16


class Hole(NamedTuple):
    """A record whose bytes are missing.

    Attributes:
        name: of the record.
        start, stop: where its bytes belong in the file.
        checksum: where its CRC-32 belongs: four bytes, little-endian, behind the record.
    """

    name: str
    start: int
    stop: int
    checksum: int


def holes(file: IO[bytes], archive: zipfile.ZipFile, folder: str) -> list[Hole]:
    """The records below `folder` that have bytes, in the order of the file.

    Raises:
        ValueError: the archive is not laid out as torch's writer does.
    """
    found = []
    for info in archive.infolist():
        if not info.filename.startswith(folder) or info.file_size == 0:
            continue
        file.seek(info.header_offset)
        *_, name_bytes, extra_bytes = _LOCAL.unpack(file.read(_LOCAL.size))
        start = info.header_offset + _LOCAL.size + name_bytes + extra_bytes
        stop = start + info.file_size
        file.seek(stop)
        if info.compress_type != zipfile.ZIP_STORED or file.read(4) != _DESCRIPTOR_MARK:
            raise ValueError(f"the record {info.filename} is not stored with its checksum behind it")
        found.append(Hole(info.filename, start, stop, stop + 4))
    return sorted(found, key=lambda hole: hole.start)


def with_checksums(directory: bytes, checksums: dict[str, int]) -> bytes:
    """The archive's directory, to the end of the file, with the CRC-32 of these records."""
    made = bytearray(directory)
    place = 0
    while made[place : place + 4] == _CENTRAL_MARK:
        lengths: Sequence[int] = struct.unpack_from("<3H", made, place + 28)
        name = bytes(made[place + _CENTRAL_BYTES : place + _CENTRAL_BYTES + lengths[0]]).decode()
        if name in checksums:
            struct.pack_into("<I", made, place + _CENTRAL_CRC, checksums[name])
        place += _CENTRAL_BYTES + sum(lengths)
    return bytes(made)
