"""A checkpoint in several parts, each stored by the plugin: a directory that counts once its record is there.

Some libraries decide themselves which files a checkpoint consists of, DeepSpeed above all. Each file is a part, saved
by the CheckpointIO under a name that no earlier save has used. When all parts of all ranks are durable, the record is
saved, by the plugin too: it names the parts, and with it the checkpoint is there, in place of the one before. So all
or nothing follows from the plugin's own: a save that is cut short leaves a directory without a record, or the old one.

::

    epoch=0-step=8.ckpt/
      checkpoint-5f0a9c1e/mp_rank_00_model_states.pt      parts, in the plugin's own form
      checkpoint-5f0a9c1e/zero_pp_rank_0_mp_rank_00_optim_states.pt
      record.ckpt                                         what names them: the checkpoint is there
      latest                                              the parts' directory, for DeepSpeed's own tools
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost._distributed import alone
from milepost.errors import CheckpointError, CheckpointFormatError
from milepost.plugins.io import raw
from milepost.storage import local

RECORD = "record.ckpt"
LATEST = "latest"
KEY = "milepost_parts"
_TAG = "checkpoint-"
_VERSION = 1


@dataclass(frozen=True)
class Parts:
    """Which parts a checkpoint consists of.

    Attributes:
        kind: what wrote them, such as ``"deepspeed"``: who loads them must know it.
        tag: the directory they lie in, within that of the checkpoint; "" where they lie beside the record.
        names: their names in there.
    """

    kind: str
    tag: str
    names: tuple[str, ...]

    def of(self, path: str) -> list[str]:
        """Where the parts of the checkpoint at `path` are stored."""
        return [part_path(path, self.tag, name) for name in self.names]


def new_tag() -> str:
    """A directory for the parts of one save. All ranks must use the same: rank 0 makes it."""
    return _TAG + secrets.token_hex(4)


def record_path(path: Any) -> str:
    return f"{path}/{RECORD}"


def part_path(path: Any, tag: str, name: str) -> str:
    return f"{path}/{tag}/{name}" if tag else f"{path}/{name}"


def is_there(io: Any, path: Any) -> bool:
    """Whether the checkpoint at `path` is one in parts, and complete."""
    record = record_path(path)
    if (exists := raw.offered(io, "exists")) is not None and (answer := exists(record)) is not None:
        return bool(answer)
    if "://" in record:
        return False
    # A plugin that stores elsewhere and cannot be asked: the local file that is written last tells.
    return Path(record).exists() or (Path(str(path)) / LATEST).is_file()


def load(io: Any, place: str, weights_only: bool | None = None) -> dict[str, Any]:
    """One part, by one rank."""
    with alone():
        return raw.load(io, place, map_location="cpu", weights_only=weights_only)


def read(io: Any, path: Any, weights_only: bool | None = None) -> tuple[dict[str, Any], Parts]:
    """The record's own values, and what it says of the parts.

    Raises:
        CheckpointError: the record is damaged, or of a later version.
    """
    record = load(io, record_path(path), weights_only)
    found = record.pop(KEY, None)
    if not isinstance(found, dict) or found.get("version") != _VERSION:
        raise CheckpointFormatError(
            f"{record_path(path)} is no record of a checkpoint in parts that this version reads: under {KEY!r} stands"
            f" {found!r}. It was written by a later version, or is something else."
        )
    return record, Parts(str(found["kind"]), str(found["tag"]), tuple(map(str, found["names"])))


class Writing:
    """One rank's half of a save in parts. `save` never raises: what failed is in `finish`, for all ranks to hear."""

    def __init__(self, io: Any, path: str, kind: str, tag: str) -> None:
        self._io, self.path, self._kind, self.tag = io, path, kind, tag
        self._handles: dict[str, raw.Pending] = {}
        self._failed: BaseException | None = None

    def save(self, name: str, state: dict[str, Any]) -> None:
        if self._failed is not None:
            return  # the checkpoint cannot come about any more
        try:
            with alone():
                self._handles[name] = raw.save(self._io, state, part_path(self.path, self.tag, name))
        except Exception as error:
            self._failed = error

    def finish(self) -> tuple[list[str], BaseException | None]:
        """Wait until this rank's parts are durable. Returns their names, and what the first that failed failed with."""
        for handle in self._handles.values():
            try:
                handle.result()
            except Exception as error:
                self._failed = self._failed or error
        return list(self._handles), self._failed

    def commit(self, record: dict[str, Any], names: Iterable[str]) -> None:
        """On one rank, once every rank's parts are durable: make them the checkpoint. Removes those of the one before.

        Raises:
            Exception: what the plugin raises. There is no new checkpoint then.
        """
        parts = Parts(self._kind, self.tag, tuple(sorted(names)))
        replaced = _parts_of(self._io, self.path)
        with alone():
            raw.save(self._io, {**record, KEY: _described(parts)}, record_path(self.path)).result()
        _say_latest(self.path, parts)
        if replaced is not None and replaced.tag != parts.tag:
            _remove_parts(self._io, self.path, replaced)
        _sweep(self._io, self.path, parts.tag)

    def discard(self) -> None:
        """Remove what this rank has saved of a checkpoint that has failed. Never raises: an error is under way."""
        for name in self._handles:
            with suppress(Exception):
                self._io.remove_checkpoint(part_path(self.path, self.tag, name))
        with suppress(OSError):
            if self.tag:
                Path(self.path, self.tag).rmdir()
                Path(self.path).rmdir()


def remove(io: Any, path: Any) -> None:
    """Remove the checkpoint at `path` through the plugin, its record first: half-removed it is none."""
    path = str(path)
    parts = _parts_of(io, path)
    io.remove_checkpoint(record_path(path))
    raw.wait(io)  # one that removes in the background: no part may go before the record
    if "://" not in path:
        local.remove(Path(path) / LATEST)
    if parts is not None:
        _remove_parts(io, path, parts)
    _sweep(io, path, keep=None)
    raw.wait(io)
    if "://" not in path and Path(path).is_dir():
        with suppress(OSError):  # what others put there stays
            Path(path).rmdir()


def verify(io: Any, path: Any) -> str | None:
    """Check the bytes of record and parts. Returns ``"cannot"`` where the plugin does not offer it.

    Raises:
        CheckpointError: something is missing or damaged.
    """
    check = raw.offered(io, "verify")
    _, parts = read(io, path)
    if check is None:
        return "cannot"
    answers = [check(place) for place in (record_path(path), *parts.of(str(path)))]
    return "cannot" if "cannot" in answers else None


def link(io: Any, source: Any, target: Any) -> bool:
    """Give the checkpoint a second name, each part by a link of the plugin's. False: not offered or not possible."""
    method = raw.offered(io, "link")
    if method is None:
        return False
    source, target = str(source), str(target)
    _, parts = read(io, source)
    replaced = _parts_of(io, target) if is_there(io, target) else None
    for old, new in zip(parts.of(source), parts.of(target), strict=True):
        if method(old, new) is False:
            return False
    if method(record_path(source), record_path(target)) is False:
        return False
    _say_latest(target, parts)
    if replaced is not None and replaced.tag != parts.tag:
        _remove_parts(io, target, replaced)
    return True


def list_in(io: Any, directory: Any) -> list[str]:
    """Paths of the complete checkpoints in parts in a local directory."""
    folder = Path(str(directory))
    if not folder.is_dir():
        return []
    return sorted(str(p) for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".") and is_there(io, p))


def _described(parts: Parts) -> dict[str, Any]:
    return {"version": _VERSION, "kind": parts.kind, "tag": parts.tag, "names": list(parts.names)}


def _parts_of(io: Any, path: str) -> Parts | None:
    """What is there already; None where nothing is, or a record that cannot be read."""
    try:
        return read(io, path)[1] if is_there(io, path) else None
    except (CheckpointError, OSError):
        return None


def _say_latest(path: str, parts: Parts) -> None:
    """Tell DeepSpeed's tools, such as its zero_to_fp32, which directory to read. Nothing of ours reads it."""
    if "://" in path or not parts.tag:
        return
    with local.replacing(Path(path) / LATEST) as file:
        file.write(parts.tag.encode())


def _remove_parts(io: Any, path: str, parts: Parts) -> None:
    for place in parts.of(path):
        io.remove_checkpoint(place)
    raw.wait(io)
    _drop_directory(path, parts.tag)


def _sweep(io: Any, path: str, keep: str | None) -> None:
    """Remove what saves that were cut short have left in the directory: no record names it."""
    if "://" in path or not Path(path).is_dir():
        return
    for stale in Path(path).glob(f"{_TAG}*"):
        if stale.name != keep and stale.is_dir():
            for part in stale.iterdir():
                with suppress(OSError):
                    io.remove_checkpoint(str(part))
            _drop_directory(path, stale.name)


def _drop_directory(path: str, tag: str) -> None:
    if "://" not in path and tag:
        shutil.rmtree(Path(path) / tag, ignore_errors=True)
