"""The bytes of a DCP checkpoint: each chunk of a tensor, and each value, is a torch file within a larger file.

torch's own reader checks nothing. Here each record is compared with the checksum that its zip holds.
"""

from __future__ import annotations

import math
import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from isal import isal_zlib

from milepost.errors import CheckpointCorruptError, CheckpointFormatError, CheckpointNotFoundError
from milepost.format import distcp, torch_zip
from milepost.format.distcp import Chunk, Item, Metadata, Slice
from milepost.format.layout import ITEM_BYTES

if TYPE_CHECKING:
    import numpy as np

_BLOCK_BYTES = 1 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a record: a signature, and at the end the lengths of name and extra
_WIDE = {"complex128": 16, "complex32": 4}
_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


def type_name(dtype: str) -> str:
    """How the format names torch's type `dtype`; torch's own name where it has none."""
    return _NAMES.get(dtype, dtype)


def item_bytes(dtype: str) -> int:
    """Size of an element of torch's type `dtype`."""
    return _WIDE.get(dtype) or ITEM_BYTES.get(type_name(dtype), 1)


class DistcpFiles:
    """A checkpoint of DCP, opened to be read.

    Raises:
        CheckpointNotFoundError: nothing is there.
        CheckpointFormatError: it is no checkpoint of DCP, or contradicts itself.
        UnsafeCheckpointError: its metadata names what DCP does not write.
        CheckpointCorruptError: a file is missing or too short.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        names = distcp.metadata_files(self.path)
        if not names:
            if not self.path.exists():
                raise CheckpointNotFoundError(f"There is no checkpoint at {self.path}.")
            raise CheckpointFormatError(f"{self.path} is no checkpoint of DCP: it has no {distcp.METADATA_NAME}.")
        read = [distcp.decode((self.path / name).read_bytes(), str(self.path / name)) for name in names]
        self.metadata: Metadata = read[0] if len(read) == 1 else distcp.merge(read)
        self._files: dict[str, IO[bytes]] = {}
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> DistcpFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    # ---- reading ---------------------------------------------------------------------------------------------------

    def value(self, key: str) -> Slice:
        """The torch file of a value. Its checksums have been compared.

        Raises:
            CheckpointCorruptError: one does not hold.
        """
        opened = self._slice(self.metadata.item(key))
        self._verify_all(opened, key)
        return opened

    def chunk(self, key: str, chunk: Chunk) -> np.ndarray[Any, Any]:
        """The bytes of a chunk, compared with their checksum: an array of the chunk's shape, of elements of its size.

        Raises:
            CheckpointCorruptError: it is damaged.
            CheckpointFormatError: it is no tensor, or another than the metadata says.
        """
        described, item = self.metadata.tensors[key], self.metadata.item(key, chunk.offsets)
        found = torch_zip.contents(self._slice(item))
        if not isinstance(found, torch_zip.StoredTensor):
            raise CheckpointFormatError(f"{self._where(item)}: {key!r} is no tensor there.")
        if (found.dtype, found.shape) != (type_name(described.dtype), chunk.shape):
            raise CheckpointFormatError(
                f"{self._where(item)}: {key!r} is {found.dtype} of shape {found.shape} there, and {described.dtype} of"
                f" shape {chunk.shape} in {distcp.METADATA_NAME}."
            )
        return _strided(self._record(item, found.record, key), found, item_bytes(described.dtype), self._where(item))

    def tensor(self, key: str) -> np.ndarray[Any, Any]:
        """All chunks of a tensor in one array."""
        import numpy as np

        described = self.metadata.tensors[key]
        if len(described.chunks) == 1:
            return np.ascontiguousarray(self.chunk(key, described.chunks[0])).reshape(described.shape)
        whole = np.empty(described.shape, dtype=f"V{item_bytes(described.dtype)}")
        for chunk in described.chunks:
            box = tuple(slice(start, start + size) for start, size in zip(*chunk, strict=True))
            whole[box] = self.chunk(key, chunk)
        return whole

    def verify(self) -> None:
        """Read everything and compare it with the checksums.

        Raises:
            CheckpointCorruptError: names the first that does not hold, and where it lies.
        """
        for key in self.metadata.values:
            self.value(key)
        for key, tensor in self.metadata.tensors.items():
            for chunk in tensor.chunks:
                self._verify_all(self._slice(self.metadata.item(key, chunk.offsets)), key)

    # ---- what must hold before anything is read --------------------------------------------------------------------

    def _check(self) -> None:
        """What is described must be there, all of it, so that memory is bounded by the size of the files."""
        spans = 0
        items = {self.metadata.item(key) for key in self.metadata.values}
        for key, tensor in self.metadata.tensors.items():
            for chunk in tensor.chunks:
                item = self.metadata.item(key, chunk.offsets)
                items.add(item)
                needed = math.prod(chunk.shape) * item_bytes(tensor.dtype)
                spans += needed
                if needed > item.length:
                    raise CheckpointFormatError(
                        f"{self._where(item)}: {item.length} bytes cannot hold the {needed} of {key!r}."
                    )
            if sum(math.prod(chunk.shape) for chunk in tensor.chunks) != math.prod(tensor.shape):
                raise CheckpointFormatError(
                    f"{self.path}: the chunks of {key!r} do not fill its shape {list(tensor.shape)} exactly."
                )
        sizes = {name: self._size(name) for name in {item.file for item in items}}
        for item in items:
            if item.start + item.length > sizes[item.file]:
                raise CheckpointCorruptError(
                    f"{self.path / item.file} has {sizes[item.file]} bytes, {item.start + item.length} were written.",
                    path=str(self.path / item.file),
                    byte_range=(sizes[item.file], item.start + item.length),
                )
        if spans > sum(sizes.values()):
            raise CheckpointFormatError(f"{self.path}: its tensors take {spans} bytes, its files fewer.")

    def _size(self, name: str) -> int:
        path = str(self.path / name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointCorruptError(f"{path} cannot be read: {error}.", path=path) from error
        status = os.fstat(descriptor)
        self._files[name] = os.fdopen(descriptor, "rb", buffering=0)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointCorruptError(f"{path} is no regular file.", path=path)
        return status.st_size

    # ---- records ---------------------------------------------------------------------------------------------------

    def _slice(self, item: Item) -> Slice:
        return Slice(self._files[item.file], item)

    def _where(self, item: Item) -> str:
        return f"{self.path / item.file}, bytes {item.start} to {item.start + item.length}"

    def _record(self, item: Item, name: str, key: str) -> bytearray:
        """The bytes of a record."""
        file = self._files[item.file].fileno()
        try:
            with zipfile.ZipFile(self._slice(item)) as archive:
                torch_zip.check_sizes(archive)
                entry = archive.getinfo(name)
            head = os.pread(file, _LOCAL_HEADER.size, item.start + entry.header_offset)
            signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(head)
            start = item.start + entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
            if signature != b"PK\3\4" or entry.compress_type or start + entry.file_size > item.start + item.length:
                raise ValueError(f"the record {name} is not stored as torch stores it")
        except (zipfile.BadZipFile, KeyError, ValueError, struct.error) as error:
            raise self._corrupt(item, key, error) from error
        data, checksum = bytearray(entry.file_size), 0
        view = memoryview(data)
        for place in range(0, len(data), _BLOCK_BYTES):
            block = view[place : place + _BLOCK_BYTES]
            if os.preadv(file, [block], start + place) != len(block):
                raise self._corrupt(item, key, EOFError("it ends early"))
            checksum = isal_zlib.crc32(block, checksum)
        if checksum != entry.CRC:
            raise self._corrupt(item, key, ValueError(f"the checksum of {name} does not hold"))
        return data

    def _verify_all(self, opened: Slice, key: str) -> None:
        try:
            with zipfile.ZipFile(opened) as archive:
                torch_zip.check_sizes(archive)
                bad = archive.testzip()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, zlib.error) as error:
            raise self._corrupt(opened.item, key, error) from error
        opened.seek(0)
        if bad is not None:
            raise self._corrupt(opened.item, key, ValueError(f"the checksum of {bad} does not hold"))

    def _corrupt(self, item: Item, key: str, error: Exception) -> CheckpointCorruptError:
        return CheckpointCorruptError(
            f"{self._where(item)}: {key!r} is damaged: {error}. Resume from an older checkpoint.",
            path=str(self.path / item.file),
            tensor=key,
            byte_range=(item.start, item.start + item.length),
        )


def _strided(data: bytearray, tensor: torch_zip.StoredTensor, width: int, where: str) -> np.ndarray[Any, Any]:
    import numpy as np

    flat = np.frombuffer(data, dtype=f"V{width}", count=len(data) // width)
    if math.prod(tensor.shape) == 0:
        return np.empty(tensor.shape, dtype=f"V{width}")
    numbers = (tensor.offset, *tensor.stride, *tensor.shape)
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True))
    if min(numbers) < 0 or last >= len(flat):
        raise CheckpointFormatError(f"{where}: the tensor reaches beyond its record {tensor.record}.")
    steps = [s * width for s in tensor.stride]
    return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, steps)
