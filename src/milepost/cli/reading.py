"""A checkpoint of any form, as the commands see it: read without torch, nothing of it run."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milepost.errors import CheckpointError, CheckpointFormatError, CheckpointNotFoundError
from milepost.format.distcp import LIGHTNING_NAME, is_distcp
from milepost.format.layout import ITEM_BYTES
from milepost.format.manifest import HEAD_NAME


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
        dtype: as safetensors names it, or torch's name.
        read: its bytes in C order.
        parts: where it is stored in parts: of each the file, its offsets and its shape.
    """

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    read: Callable[[], bytes]
    parts: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Opened:
    """A checkpoint.

    Attributes:
        form: ``directory``, ``ckpt``, ``safetensors``, or ``dcp`` for one of torch.distributed.checkpoint.
        metrics: empty where the form has none.
        tensors: by key path.
        values: what is no tensor, by key path, as text for people.
        time: of the save, or of the file, in seconds since 1970.
    """

    path: str
    form: str
    step: int | None
    epoch: int | None
    time: float
    size_bytes: int
    metrics: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)


def form_of(path: Path) -> str | None:
    """Which form a checkpoint at `path` has, None where it is none."""
    if path.is_dir():
        return "directory" if (path / HEAD_NAME).is_file() else "dcp" if is_distcp(path) else None
    if not path.is_file():
        return None
    if path.suffix == ".safetensors":
        return "safetensors"
    return "ckpt" if zipfile.is_zipfile(path) or (path.suffix == ".ckpt" and _is_torn(path)) else None


def _is_torn(path: Path) -> bool:
    """Whether it may be a file of torch that lost its end, where a zip has its directory, or was never filled."""
    with path.open("rb") as file:
        start = file.read(4)
    return start == b"PK\3\4" or not start.strip(b"\0")


def find(directory: Path) -> list[Path]:
    """Checkpoints in `directory`, or the one that it is."""
    if form_of(directory) is not None:
        return [directory]
    if not directory.is_dir():
        raise _is_none(directory)
    return sorted(p for p in directory.iterdir() if not p.name.startswith(".") and form_of(p) is not None)


def open_checkpoint(path: Path) -> Opened:
    """Read what a checkpoint holds, but not its tensors' bytes.

    Raises:
        CheckpointError: it is not there, of no form that is known, or damaged.
    """
    form = form_of(path)
    if form == "directory":
        return _directory(path)
    if form == "safetensors":
        return _safetensors(path)
    if form == "ckpt":
        return _torch_file(path)
    if form == "dcp":
        return _distcp(path)
    raise _is_none(path)


def _is_none(path: Path) -> CheckpointError:
    if not path.exists():
        return CheckpointNotFoundError(f"There is nothing at {path}.")
    return CheckpointFormatError(
        f"{path} is no checkpoint: neither a directory with a {HEAD_NAME} or a .metadata, nor a file of torch."
    )


def verify(path: Path) -> str | None:
    """Check every byte. Returns why that cannot be done where the form holds no digests, None where all is sound.

    Raises:
        CheckpointError: it is damaged.
    """
    form = form_of(path)
    if form == "directory":
        from milepost.engine.reader import StoredCheckpoint
        from milepost.engine.writer import Workers

        workers = Workers(2)
        try:
            with StoredCheckpoint(path) as stored:
                stored.verify(workers)
        finally:
            workers.close()
        return None
    if form == "ckpt":
        from milepost.format import sealed

        with path.open("rb") as file:
            return None if sealed.verify(file, str(path)) else "it has no checksums"
    if form == "dcp":
        from milepost.format.distcp_files import DistcpFiles

        with DistcpFiles(path) as files:
            files.verify()
        return "every checksum in it holds, but its .metadata has none"
    open_checkpoint(path)
    return "a safetensors file holds no digests"


def size_of(path: Path) -> int:
    """Bytes on the disk, a linked file counted in full."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


# ---- the forms -------------------------------------------------------------------------------------------------------


def _directory(path: Path) -> Opened:
    from milepost.cli import sharded
    from milepost.engine.reader import StoredCheckpoint
    from milepost.format.codec import PartsRef, Tagged, TensorRef
    from milepost.format.manifest import metrics_as_numbers

    def open_up(value: Any) -> Any:
        return value.data if isinstance(value, Tagged) else value

    tensors, values = {}, {}
    with StoredCheckpoint(path) as stored:
        head, tree = stored.head, stored.tree
        given = sharded.own_values(stored, list(_leaves(tree, open_up)))
        for name, value in ((n, v) for place, leaf in given for n, v in _leaves(leaf, open_up, place)):
            if not isinstance(value, (TensorRef, PartsRef)):
                values[name] = _text(value)
                continue
            found = sharded.located(stored, path, value)
            dtype, shape, rows = found
            size = sum(row.stop - row.start for row, _ in rows)
            parts = tuple((row.file.name, box.offsets, box.shape) for row, box in rows if box is not None)
            tensors[name] = Tensor(dtype, shape, size, sharded.reader(found, _range_reader), parts)
    epoch = tree.get("epoch") if isinstance(tree, dict) else None
    return Opened(
        str(path), "directory", head.step, epoch if isinstance(epoch, int) else None, head.time, size_of(path),
        metrics_as_numbers(head.metrics), tensors, values,
    )  # fmt: skip


def _torch_file(path: Path) -> Opened:
    from milepost.format import torch_zip

    with path.open("rb") as file:
        content = torch_zip.contents(file)
    tensors, values = {}, {}
    for name, value in _leaves(content, lambda v: v):
        if isinstance(value, torch_zip.StoredTensor):
            width = ITEM_BYTES.get(value.dtype) or (16 if value.dtype == "complex128" else 1)
            size = width * math.prod(value.shape)
            tensors[name] = Tensor(value.dtype, value.shape, size, _record_reader(path, value, width))
        else:
            values[name] = _text(value)
    top = content if isinstance(content, dict) else {}
    step, epoch = (n if isinstance(n, int) else None for n in (top.get("global_step"), top.get("epoch")))
    stat = path.stat()
    return Opened(str(path), "ckpt", step, epoch, stat.st_mtime, stat.st_size, {}, tensors, values)


def _distcp(path: Path) -> Opened:
    from milepost.format import torch_zip
    from milepost.format.distcp_files import DistcpFiles, item_bytes, type_name

    def reader(key: str) -> Callable[[], bytes]:
        def read() -> bytes:
            with DistcpFiles(path) as files:
                return files.tensor(key).tobytes()

        return read

    with DistcpFiles(path) as files:
        described = files.metadata.tensors.items()
        values = {key: torch_zip.contents(files.value(key)) for key in files.metadata.values}
    tensors = {
        key: Tensor(type_name(t.dtype), t.shape, item_bytes(t.dtype) * math.prod(t.shape), reader(key))
        for key, t in described
    }
    rest = _torch_file(path / LIGHTNING_NAME) if (path / LIGHTNING_NAME).is_file() else None
    texts = {key: _text(value) for key, value in values.items()} | (rest.values if rest else {})
    step, epoch = (n if isinstance(n, int) else None for n in (values.get("global_step"), values.get("epoch")))
    return Opened(
        str(path), "dcp", rest.step if rest else step, rest.epoch if rest else epoch, path.stat().st_mtime,
        size_of(path), {}, tensors | (rest.tensors if rest else {}), texts,
    )  # fmt: skip


def _safetensors(path: Path) -> Opened:
    from milepost.format.safetensors import read_header

    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header = read_header(file, size)
        tensors = {name: _described(path, item, header.base, size) for name, item in header.tensors.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointFormatError(f"{path} is no safetensors file: {error}.") from error
    metadata = {f"__metadata__.{name}": text for name, text in header.metadata.items()}
    return Opened(str(path), "safetensors", None, None, path.stat().st_mtime, size, {}, tensors, metadata)


def _described(path: Path, item: dict[str, Any], base: int, size: int) -> Tensor:
    start, stop = (base + int(n) for n in item["data_offsets"])
    if not base <= start <= stop <= size:
        raise ValueError(f"a tensor at bytes {start} to {stop} of {size}")
    return Tensor(str(item["dtype"]), tuple(map(int, item["shape"])), stop - start, _range_reader(path, start, stop))


# ---- leaves ----------------------------------------------------------------------------------------------------------


def _leaves(tree: Any, open_up: Callable[[Any], Any], name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything that is no container, with its key path. Named tuples, such as references, are leaves."""
    stack: list[tuple[str, Any]] = [(name, tree)]
    while stack:
        path, value = stack.pop()
        value = open_up(value)
        if isinstance(value, dict) and value:
            items = [(str(k), v) for k, v in value.items()]
        elif type(value) in (list, tuple) and value and any(_holds_more(v) for v in value):
            items = [(str(n), v) for n, v in enumerate(value)]
        else:
            yield path, value
            continue
        stack.extend((f"{path}.{k}" if path else k, v) for k, v in reversed(items))


def _holds_more(value: Any) -> bool:
    return not isinstance(value, (str, int, float, bool, bytes, type(None)))


def _text(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _range_reader(path: Path, start: int, stop: int) -> Callable[[], bytes]:
    def read() -> bytes:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            file.seek(start)
            return file.read(stop - start)

    return read


def _record_reader(path: Path, tensor: Any, width: int) -> Callable[[], bytes]:
    def read() -> bytes:
        import numpy

        with zipfile.ZipFile(path) as archive:
            data = archive.read(tensor.record)
        flat = numpy.frombuffer(data, dtype=f"V{width}")
        last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True))
        if math.prod(tensor.shape) == 0:
            return b""
        if min((tensor.offset, *tensor.stride, *tensor.shape)) < 0 or last >= len(flat):
            raise CheckpointFormatError(f"{path}: a tensor reaches beyond its record {tensor.record}.")
        steps = [s * width for s in tensor.stride]
        view = numpy.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, steps, writeable=False)
        return numpy.ascontiguousarray(view).tobytes()

    return read
