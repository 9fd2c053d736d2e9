"""DeepSpeed's checkpoints through a CheckpointIO: its CheckpointEngine, which it calls for every file it writes.

A plain loop assigns it, and DeepSpeed's own calls go on as they are::

    engine.checkpoint_engine = CheckpointIOEngine(SnapshotCheckpointIO())
    engine.save_checkpoint("checkpoints", tag="step8")
    engine.load_checkpoint("checkpoints", tag="step8")
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from milepost import _distributed, _optional
from milepost.errors import (
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    MisconfigurationException,
)
from milepost.plugins.io import parts, zero
from milepost.plugins.io.checkpoint_io import is_checkpoint_io

_OBJECT = "milepost.deepspeed_object"
# The classes whose objects DeepSpeed puts into its files, by module. They are data, and stored as such.
_OBJECTS = {
    "LossScaler": "deepspeed.runtime.fp16.loss_scaler",
    "DynamicLossScaler": "deepspeed.runtime.fp16.loss_scaler",
    "fragment_address": "deepspeed.utils.tensor_fragment",
}


class CheckpointIOEngine:
    """Gives every file of a DeepSpeed checkpoint to a CheckpointIO, as a part, and commits them together.

    The checkpoint counts once the parts of all ranks are durable and its record is (milepost.plugins.io.parts).
    Where one rank's part fails, every rank raises that error, and there is no new checkpoint. DeepSpeed writes its
    file ``latest`` after that. What DeepSpeed puts in as objects is stored as plain values, so nothing is pickled
    that the plugin would not pickle anyway.

    Called by DeepSpeed on every rank. A `tag` that is saved again is no checkpoint while it is being replaced; use a
    new one for each save, as DeepSpeed does where none is given, and `DeepSpeedStrategy` always.

    Args:
        io: any object with the three methods of a CheckpointIO.

    Raises:
        MissingDependencyError: DeepSpeed is not installed.
        MisconfigurationException: `io` is no CheckpointIO.
    """

    def __init__(self, io: Any) -> None:
        needs = {"extra": "deepspeed", "needed_by": "CheckpointIOEngine"}
        _optional.require("deepspeed", **needs)
        theirs = _optional.require("deepspeed.runtime.checkpoint_engine.checkpoint_engine", **needs)
        if not is_checkpoint_io(io):
            raise MisconfigurationException(
                f"CheckpointIOEngine({io!r}): it needs save_checkpoint, load_checkpoint and remove_checkpoint."
            )
        theirs.CheckpointEngine.register(CheckpointIOEngine)
        self.name = "CheckpointIOEngine"
        self.io = io
        self._writing: parts.Writing | None = None
        self._target: str | None = None  # the checkpoint's own path, where the strategy saves or loads one
        self._found: parts.Parts | None = None
        self._stage = ""
        self._record: dict[str, Any] = {}
        self._module: Mapping[str, Any] | None = None

    # ---- what the strategy calls -----------------------------------------------------------------------------------

    @contextmanager
    def saving(self, path: str, stage: str, record: dict[str, Any], module: Mapping[str, Any] | None) -> Iterator[None]:
        """Inside, what DeepSpeed saves into the directory `stage` becomes the checkpoint at `path`.

        Args:
            record: what is stored beside the parts. Rank 0's counts.
            module: what to store as the model's weights, in the place of what DeepSpeed gives; None: that.
        """
        self._target, self._stage, self._record, self._module = path, stage, record, module
        try:
            yield
        finally:
            self._target, self._record, self._module, self._writing = None, {}, None, None

    @contextmanager
    def loading(self, path: str, stage: str, found: parts.Parts) -> Iterator[str]:
        """Inside, DeepSpeed loads the checkpoint at `path` as the directory that this gives, within `stage`.

        DeepSpeed looks for its files by name on the local disk before it asks for them: it is shown empty ones.
        """
        place = Path(stage, "shown")
        place.mkdir()
        for name in found.names:
            (place / name).touch()
        self._target, self._stage, self._found = path, str(place), found
        try:
            yield place.name
        finally:
            self._target, self._found = None, None

    # ---- what DeepSpeed calls --------------------------------------------------------------------------------------

    def create(self, info: Any) -> None:
        """A save begins, on every rank."""
        if self._target is not None:
            tag = _distributed.broadcast_object(parts.new_tag())
            self._writing = parts.Writing(self.io, self._target, zero.KIND, tag)
            return
        path = f"{info.save_dir}/{info.tag}"
        failed = None
        if _distributed.rank() == 0 and parts.is_there(self.io, path):
            try:
                parts.remove(self.io, path)
            except Exception as error:
                failed = error
        if (failed := _distributed.broadcast_object(failed)) is not None:
            raise failed
        self._writing = parts.Writing(self.io, path, zero.KIND, "")

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Save one file. An error is kept until `commit`: the other ranks must hear of it, and wait there."""
        assert self._writing is not None
        if self._module is not None and "module" in state_dict:
            state_dict = {**state_dict, "module": self._module}
        self._writing.save(Path(path).name, _as_data(state_dict))

    def commit(self, info: Any) -> bool:
        """Called on every rank when it has saved its files: make them one checkpoint, or fail on every rank.

        Raises:
            CheckpointSaveError: of the first rank whose part failed, or of the record.
        """
        writing, self._writing = self._writing, None
        assert writing is not None
        names, error = writing.finish()
        votes = _distributed.all_gather_objects((names, _told(error)))
        failed = next(((rank, told) for rank, (_, told) in enumerate(votes) if told is not None), None)
        if failed is None:
            refused = None
            if _distributed.rank() == 0:
                try:
                    writing.commit(self._record, [name for names, _ in votes for name in names])
                except Exception as raised:
                    error, refused = raised, _told(raised)
            if (refused := _distributed.broadcast_object(refused)) is not None:
                failed = (0, refused)
        if failed is not None:
            writing.discard()
            raise _failure(writing.path, *failed, self._record.get("global_step")) from error
        return True

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        """Load one file; tensors come to the host, from where DeepSpeed copies them.

        Raises:
            CheckpointNotFoundError: it belongs to no complete checkpoint.
        """
        if self._target is not None and self._found is not None:
            path = parts.part_path(self._target, self._found.tag, Path(path).name)
        elif not parts.is_there(self.io, Path(path).parent):
            raise CheckpointNotFoundError(
                f"{path} belongs to no complete checkpoint: there is no {parts.RECORD} beside it. Its save was cut"
                " short, or DeepSpeed wrote it without this engine; its own TorchCheckpointEngine loads that."
            )
        return _as_objects(parts.load(self.io, path))  # type: ignore[no-any-return]

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def set_commit_info(self, info: Any) -> None:
        return None

    def get_commit_info(self) -> None:
        return None

    def cleanup(self) -> None:
        return None

    def preserves_storage_sharing(self) -> bool:
        return True


def _told(error: BaseException | None) -> str | None:
    """What the other ranks hear: text, since not every error can be sent."""
    return None if error is None else f"{type(error).__name__}: {error}"


def _failure(path: str, rank: int, told: str, step: Any) -> CheckpointError:
    return CheckpointSaveError(
        f"Saving the checkpoint of step {step} to {path!r} failed on rank {rank}: {told} There is no new checkpoint on"
        " any rank, and what was there before is intact.",
        path=path,
        step=step if isinstance(step, int) else None,
    )


def _as_data(value: Any) -> Any:
    """A copy of the containers without DeepSpeed's own objects."""
    kind = type(value)
    if kind.__name__ in _OBJECTS and kind.__module__ == _OBJECTS[kind.__name__]:
        return {_OBJECT: kind.__name__, "attributes": _as_data(dict(vars(value)))}
    if isinstance(value, dict):
        made = (OrderedDict if isinstance(value, OrderedDict) else dict)((k, _as_data(v)) for k, v in value.items())
        if hasattr(value, "_metadata"):
            made._metadata = value._metadata  # type: ignore[attr-defined]
        return made
    if kind in (list, tuple):
        return kind(map(_as_data, value))
    if isinstance(value, int) and kind.__module__.startswith("deepspeed."):
        return int(value)  # its enums are numbers
    return str(value) if isinstance(value, os.PathLike) else value


def _as_objects(value: Any) -> Any:
    """The inverse of `_as_data`: objects of the known classes only, made without running their code."""
    if isinstance(value, dict):
        if _OBJECT in value:
            return _made(str(value[_OBJECT]), value["attributes"])
        for key, item in value.items():
            value[key] = _as_objects(item)
        return value
    if type(value) in (list, tuple):
        return type(value)(map(_as_objects, value))
    return value


def _made(name: str, attributes: dict[str, Any]) -> Any:
    if name not in _OBJECTS:
        raise CheckpointFormatError(f"The checkpoint holds a {name!r} of DeepSpeed, which is not known here.")
    module = _optional.require(_OBJECTS[name], extra="deepspeed", needed_by="this checkpoint")
    cls = getattr(module, name)
    made = cls.__new__(cls)
    for key, item in attributes.items():
        object.__setattr__(made, key, item)
    return made
