"""The head and the indexes of a checkpoint directory: typed, checked whole before anything is believed.

Pure: no I/O, no torch. See docs/format.md for the bytes. All numbers in a file are bounded by the sizes of the files
themselves before memory is asked for, so that a hostile head cannot make a reader allocate.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import xxhash

from milepost.errors import CheckpointCorruptError, CheckpointFormatError
from milepost.format.boxes import Box, lies_within, part_name
from milepost.format.layout import ITEM_BYTES, TensorEntry, piece_count

FORMAT = "milepost-checkpoint"
VERSION = 1
HEAD_NAME = "manifest.json"
HEAD_MAX_BYTES = 8192
TREE_NAME = "tree.json"
LISTING_NAME = "blobs.json"
_LATEST_SECONDS = 253_402_300_800.0  # the year 9999
_MAX_DIMENSIONS = 64  # torch's own limit
_MAX_BYTES = 1 << 62
_MALFORMED = (msgspec.MsgspecError, RecursionError, UnicodeError)
_DIGEST_KEY = b',"xxh3_128":"'
_DIGEST_TAIL_BYTES = len(_DIGEST_KEY) + 32 + 3  # …"}\n


class Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the directory whose bytes have one digest: an index, or the tree."""

    name: str
    bytes: int
    xxh3_128: str


class Blob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of tensors.

    Attributes:
        group: what it was planned for (a key of the saved state); blobs of one group are kept apart by rate of change.
        saves: commits that have linked it since it was written (0: written by this one).
        verified: commits since its bytes were last read and verified.
        rank: that wrote it, where more than one rank saved.
    """

    name: str
    bytes: int
    index: Stored
    group: str
    saves: int = 0
    verified: int = 0
    rank: int | msgspec.UnsetType = msgspec.UNSET


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``manifest.json`` without its own digest.

    Attributes:
        time: of the save, in seconds since 1970.
        metrics: name to number; JSON has no NaN and no infinity, those stand as text.
        world_size: ranks of the run that saved.
        maps: ``<group>.safetensors.index.json`` of each group that lies in two blobs, for other tools.
        trees: by rank, the values that are each rank's own; none where the state has no such values.
        listing: the file in which `blobs`, `maps` and `trees` stand, where they are too many for the head.
    """

    format: str
    version: int
    step: int
    time: float
    metrics: dict[str, float | str]
    world_size: int
    blobs: list[Blob]
    tree: Stored
    maps: list[Stored] = []
    trees: list[Stored] | msgspec.UnsetType = msgspec.UNSET
    listing: Stored | msgspec.UnsetType = msgspec.UNSET

    def rank_trees(self) -> list[Stored]:
        """By rank; empty where no value is a rank's own."""
        return [] if self.trees is msgspec.UNSET else self.trees

    def small_files(self) -> list[Stored]:
        """The files of one digest, indexes apart."""
        listing = [] if self.listing is msgspec.UNSET else [self.listing]
        return [self.tree, *self.maps, *self.rank_trees(), *listing]

    def files(self) -> list[str]:
        """Names of all the files that the checkpoint consists of, the head last."""
        names = [name for blob in self.blobs for name in (blob.name, blob.index.name)]
        return [*names, *(found.name for found in self.small_files()), HEAD_NAME]


class Listing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``blobs.json``: what the head says of blobs, maps and trees where it has no room for that."""

    version: int
    blobs: list[Blob]
    maps: list[Stored]
    trees: list[Stored]


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What lies where in one blob, in columns: a million tensors then cost little more than their names.

    Attributes:
        bytes: size of the blob.
        names, dtypes, shapes, starts: one row for each tensor, in the order of the file.
        strides: by row, where the tensor's memory was dense but not in C order (channels last).
        stored_as: by row, where torch's type is none of safetensors': the type's own name and the tensor's shape.
        digests: 32 hexadecimal digits for each piece, one after the other.
        boxes: by row, where it is a part of a larger tensor: that one's name and shape, and where the part begins in
            it. Left out of the file where there are none.
    """

    version: int
    bytes: int
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    starts: list[int]
    strides: dict[str, list[int]]
    stored_as: dict[str, tuple[str, list[int]]]
    digests: str
    boxes: dict[str, tuple[str, list[int], list[int]]] = {}

    def entry(self, row: int) -> TensorEntry:
        shape, start = tuple(self.shapes[row]), self.starts[row]
        stop = start + ITEM_BYTES[self.dtypes[row]] * math.prod(shape)
        return TensorEntry(self.names[row], self.dtypes[row], shape, start, stop)

    def entries(self) -> list[TensorEntry]:
        """All rows."""
        return [self.entry(row) for row in range(len(self.names))]

    def digest(self, piece: int) -> str:
        return self.digests[32 * piece : 32 * piece + 32]

    def shape(self, row: int) -> tuple[int, ...]:
        """The tensor's own, also where its bytes are stored as another type."""
        other = self.stored_as.get(str(row)) if self.stored_as else None
        return tuple(self.shapes[row] if other is None else other[1])

    def box(self, row: int) -> Box | None:
        """Which part of a larger tensor the row is; None for a whole one."""
        found = self.boxes.get(str(row)) if self.boxes else None
        return None if found is None else Box(tuple(found[2]), self.shape(row))


def digest(data: Any) -> str:
    """xxh3-128 of a buffer, as 32 hexadecimal digits."""
    return str(xxhash.xxh3_128_hexdigest(data))


def encode_head(head: Head) -> bytes:
    """The bytes of ``manifest.json``.

    Raises:
        ValueError: it would be larger than `HEAD_MAX_BYTES`.
    """
    body = msgspec.json.encode(head)[:-1]
    data = body + _DIGEST_KEY + digest(body).encode() + b'"}\n'
    if len(data) > HEAD_MAX_BYTES:
        raise ValueError(
            f"The head of the checkpoint takes {len(data)} bytes of at most {HEAD_MAX_BYTES}: give fewer metrics, or"
            " shorter names to the parts of the state."
        )
    return data


def encode_listing(head: Head) -> tuple[Head, bytes | None]:
    """The head as it is stored, and the bytes of ``blobs.json`` where it needs one to fit into `HEAD_MAX_BYTES`."""
    if head.world_size < 2 or len(msgspec.json.encode(head)) + _DIGEST_TAIL_BYTES <= HEAD_MAX_BYTES:
        return head, None
    data = msgspec.json.encode(Listing(VERSION, head.blobs, head.maps, head.rank_trees()))
    stored = Stored(LISTING_NAME, len(data), digest(data))
    return msgspec.structs.replace(head, blobs=[], maps=[], trees=msgspec.UNSET, listing=stored), data


def decode_head(data: bytes, path: str) -> Head:
    """Read ``manifest.json``.

    Raises:
        CheckpointCorruptError: its digest does not hold.
        CheckpointFormatError: it is sound, but of another format or of a newer version.
    """
    body, tail = data[:-_DIGEST_TAIL_BYTES], data[-_DIGEST_TAIL_BYTES:]
    expected = _DIGEST_KEY + digest(body).encode() + b'"}\n'
    if tail != expected:
        raise CheckpointCorruptError(
            f"{path} does not match its own digest. Resume from an older checkpoint.",
            path=path,
            byte_range=(0, len(data)),
        )
    try:
        known = msgspec.json.decode(body + b"}", type=_Version)
    except _MALFORMED as error:
        raise CheckpointFormatError(f"{path} is no head of a checkpoint: {error}.") from error
    if known.format != FORMAT or known.version > VERSION:
        raise CheckpointFormatError(
            f"{path} is of format {known.format!r} version {known.version}; this Milepost reads {FORMAT!r} up to"
            f" version {VERSION}. Read it with a newer Milepost."
        )
    head: Head = _decode(body + b"}", Head, path)
    if head.listing is not msgspec.UNSET and (head.blobs or head.maps or head.trees is not msgspec.UNSET):
        raise CheckpointFormatError(f"{path} lists files itself and in {head.listing.name!r}.")
    _check_head(head, path)
    return head


def decode_listing(data: bytes, head: Head, path: str) -> Head:
    """The head with what ``blobs.json`` lists.

    Raises:
        CheckpointCorruptError: the listing's digest does not hold.
        CheckpointFormatError: it is malformed, or contradicts itself or the head.
    """
    assert head.listing is not msgspec.UNSET
    check_stored(data, head.listing, path)
    found: Listing = _decode(data, Listing, path)
    if found.version > VERSION:
        raise CheckpointFormatError(f"{path} is of version {found.version}. Read it with a newer Milepost.")
    whole = msgspec.structs.replace(
        head, blobs=found.blobs, maps=found.maps, trees=found.trees if found.trees else msgspec.UNSET
    )
    _check_head(whole, path)
    return whole


def _check_head(head: Head, path: str) -> None:
    _check_numbers(head, path)
    names = head.files()
    for name in names:
        if not _plain_name(name):
            raise CheckpointFormatError(f"{path} names the file {name!r}, which is not a plain name in its directory.")
    if len(set(names)) != len(names):
        twice = min(name for name, count in Counter(names).items() if count > 1)
        raise CheckpointFormatError(f"{path} names a file twice: {twice!r}.")
    if len(head.rank_trees()) not in (0, head.world_size):
        raise CheckpointFormatError(f"{path} has {len(head.rank_trees())} trees of {head.world_size} ranks.")


def _check_numbers(head: Head, path: str) -> None:
    sizes = [*(found.bytes for found in head.small_files()), *(b.bytes for b in head.blobs)]
    counts = [head.step, head.world_size, *(b.saves for b in head.blobs), *(b.verified for b in head.blobs)]
    ranks = [blob.rank for blob in head.blobs if blob.rank is not msgspec.UNSET]
    if min([*sizes, *counts, *ranks, *(b.index.bytes for b in head.blobs)]) < 0:
        raise CheckpointFormatError(f"{path} holds a negative size, step or count.")
    if max(ranks, default=0) >= max(head.world_size, 1):
        raise CheckpointFormatError(f"{path} holds a blob of rank {max(ranks)} of {head.world_size}.")
    if not 0 <= head.time < _LATEST_SECONDS:
        raise CheckpointFormatError(f"{path} was saved at {head.time} seconds, which is no time of this calendar.")
    if texts := [v for v in head.metrics.values() if isinstance(v, str) and v not in ("nan", "inf", "-inf")]:
        raise CheckpointFormatError(f"{path} holds {texts[0]!r} as the value of a metric.")


class _Version(msgspec.Struct):
    format: str
    version: int


def encode_index(index: Index) -> bytes:
    return msgspec.json.encode(index)


def decode_index(data: bytes, stored: Stored, blob: Blob, path: str) -> Index:
    """Read an index and check that all it says fits into its blob.

    Raises:
        CheckpointCorruptError: its digest does not hold.
        CheckpointFormatError: it contradicts itself: overlapping tensors, ranges out of the file, unknown types.
    """
    check_stored(data, stored, path)
    index: Index = _decode(data, Index, path)
    if index.version > VERSION:
        raise CheckpointFormatError(f"{path} is of version {index.version}. Read it with a newer Milepost.")
    rows = len(index.names)
    if {len(index.dtypes), len(index.shapes), len(index.starts)} != {rows} or index.bytes != blob.bytes:
        raise CheckpointFormatError(f"{path}: its columns or its size do not fit together.")
    if len(index.digests) != 32 * piece_count(index.bytes):
        raise CheckpointFormatError(f"{path}: {len(index.digests) // 32} digests for {index.bytes} bytes.")
    if len(set(index.names)) != rows:
        raise CheckpointFormatError(f"{path}: two tensors have one name.")
    previous = 8
    for row in range(rows):
        if index.dtypes[row] not in ITEM_BYTES or not sound_shape(index.shapes[row]):
            raise CheckpointFormatError(
                f"{path}: tensor {index.names[row]!r} has dtype {index.dtypes[row]!r} and shape {index.shapes[row]}."
            )
        entry = index.entry(row)
        if entry.start < previous or entry.stop > index.bytes:
            raise CheckpointFormatError(
                f"{path}: tensor {entry.name!r} lies at bytes {entry.start} to {entry.stop} of {index.bytes}, over"
                " another tensor or outside of the file."
            )
        previous = entry.stop
    for row_text, stride in index.strides.items():
        _check_strides(index, row_text, stride, path)
    for row_text, (kind, shape) in index.stored_as.items():
        row = _row(index, row_text, path)
        if not sound_shape(shape) or index.dtypes[row] != "U8" or row_text in index.strides:
            raise CheckpointFormatError(
                f"{path}: tensor {index.names[row]!r} is stored as {kind!r} with the shape {shape}."
            )
    for row_text, (name, shape, _) in index.boxes.items():
        row = _row(index, row_text, path)
        box = index.box(row)
        assert box is not None
        within = sound_shape(shape) and lies_within(box, shape) and (box.volume > 0 or math.prod(shape) == 0)
        if not within or row_text in index.strides or index.names[row] != part_name(name, box):
            raise CheckpointFormatError(f"{path}: {index.names[row]!r} is no part of a tensor of shape {shape}.")
    return index


def sound_shape(shape: Sequence[int]) -> bool:
    """Whether it can be computed with: few sizes, none negative, their product far from what a machine can count."""
    if len(shape) > _MAX_DIMENSIONS or any(not 0 <= n < _MAX_BYTES for n in shape):
        return False
    return math.prod(max(n, 1) for n in shape) < _MAX_BYTES  # the others count also where one of them is 0


def check_stored(data: bytes, stored: Stored, path: str) -> None:
    """Raise CheckpointCorruptError unless `data` is what `stored` describes."""
    if len(data) != stored.bytes or digest(data) != stored.xxh3_128:
        raise CheckpointCorruptError(
            f"{path} does not match its digest ({len(data)} bytes, {stored.bytes} expected). Resume from an older"
            " checkpoint.",
            path=path,
            byte_range=(0, len(data)),
        )


def _check_strides(index: Index, row_text: str, stride: list[int], path: str) -> None:
    """Strides must walk over the tensor's own elements, each once."""
    shape = index.shapes[_row(index, row_text, path)]
    expected = 1
    for size, step in sorted(zip(shape, stride, strict=False), key=lambda pair: pair[1]):
        if size != 1 and step != expected:
            expected = -1
            break
        expected *= size
    if expected < 0 or len(shape) != len(stride) or any(not 0 <= step < _MAX_BYTES for step in stride):
        raise CheckpointFormatError(f"{path}: strides {stride} do not fit the shape {shape}.")


def _row(index: Index, text: str, path: str) -> int:
    if not text.isdecimal() or len(text) > 12 or text != str(int(text)) or int(text) >= len(index.names):
        raise CheckpointFormatError(f"{path}: there is no row {text!r}.")
    return int(text)


def _decode(data: bytes, kind: Any, path: str) -> Any:
    try:
        made = msgspec.json.decode(data, type=kind)
        if msgspec.json.encode(made) != data:  # written by another program, or a key stands twice: msgspec takes that
            json.loads(data.decode(), object_pairs_hook=refuse_twins)
    except (*_MALFORMED, ValueError) as error:
        raise CheckpointFormatError(f"{path} is not what its name says: {error}.") from error
    return made


def refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: a dict of the pairs.

    Raises:
        ValueError: a key stands twice, of which readers would take different ones.
    """
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} stands twice")
    return made


def _plain_name(name: str) -> bool:
    return 0 < len(name) <= 255 and name not in (".", "..") and not any(c in "/\\\0" or ord(c) < 32 for c in name)


def metrics_as_data(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Metrics as the head holds them: JSON has no NaN and no infinity, so those stand as text."""
    return {name: float(value) if value - value == 0 else repr(float(value)) for name, value in metrics.items()}


def metrics_as_numbers(metrics: Mapping[str, float | str]) -> dict[str, float]:
    """The reverse of `metrics_as_data`; text that is no number is left out."""
    return {n: float(v) for n, v in metrics.items() if not isinstance(v, str) or v in ("nan", "inf", "-inf")}
