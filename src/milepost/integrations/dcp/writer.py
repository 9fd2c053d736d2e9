"""`MilepostWriter`: what ``torch.distributed.checkpoint.save`` and ``async_save`` write with."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msgspec import structs
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from milepost.engine.commit import PendingDirectory, make_parents, sweep
from milepost.engine.save import Saving, new_head
from milepost.engine.writer import Workers
from milepost.errors import CheckpointError, CheckpointSaveError, MisconfigurationException
from milepost.format import codec
from milepost.format.codec import PartsRef, RanksRef, TensorRef
from milepost.integrations.dcp.nesting import nest
from milepost.integrations.dcp.rank_files import RankFiles, Stored, base_of, write_rank
from milepost.storage.store import LocalStore, Store

_STEP = re.compile(r"\d+")


@dataclass(frozen=True)
class _Ranks:
    """What the coordinator tells each rank in its plan. It may be a plan that was kept from an earlier save."""

    rank: int
    count: int


class MilepostWriter(StorageWriter):
    """Writes a checkpoint directory of Milepost's: whole or not at all, with digests, and without pickle.

    ::

        dcp.save(state, storage_writer=MilepostWriter("runs/step-00000100"))

    What did not change since the checkpoint beside it is linked. Each rank writes beside the target, and the
    coordinator commits in DCP's last step; if any rank fails before, what was at the path is untouched.

    Args:
        path: the checkpoint; the `checkpoint_id` of `dcp.save` takes its place. One that is there is replaced in one
            step.
        step: of the training. None: the last number in the name of the path, or 0.
        metrics: numbers to be found again in listings.
        allow_pickle: pickle what cannot be data, with a warning, in place of an error. Such values load only with
            ``unpickle=True``.
        threads: of each rank, that copy, digest and write.
        store: the file system; another one is for tests.

    Raises:
        UnencodableValueError, CheckpointSaveError: as causes, of the error that DCP raises on every rank.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        allow_pickle: bool = False,
        threads: int = 2,
        store: Store | None = None,
    ) -> None:
        self._path = path
        self._step = step
        self._metrics = dict(metrics or {})
        self._allow_pickle = allow_pickle
        self._threads = threads
        self._store = store or LocalStore()
        self._is_coordinator = True
        self._pending: PendingDirectory | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which saves with a writer of its own."""
        return {**self.__dict__, "_pending": None}

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be half gone
            self._let_go()

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The path that is written."""
        if self._path is None:
            raise MisconfigurationException("Give MilepostWriter a path, or dcp.save a checkpoint_id.")
        return self._path

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in str(checkpoint_id)

    # ---- in the order in which DCP calls ---------------------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._let_go()
        self._path = checkpoint_id or self._path

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise MisconfigurationException(
                "use_collectives=False lets each rank save by itself, so that nobody knows when all have: leave it out."
            )
        self._let_go()
        self._is_coordinator = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        parent = os.path.dirname(self._target)  # noqa: PTH120
        with _failing(self._target, self._number()):
            make_parents(self._store, parent)
            sweep(self._store, parent)
        return [replace(plan, storage_data=_Ranks(rank, len(plans))) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        ranks: _Ranks = plan.storage_data
        workers = Workers(self._threads)
        try:
            with _failing(self._target, self._number()):
                self._pending = PendingDirectory(self._store, self._target)
                last = base_of(self._target, ranks.rank, ranks.count)
                pickled = _warn_of_pickle if self._allow_pickle else None
                stored, files = write_rank(
                    plan, planner, self._pending, self._store, workers, ranks.rank, ranks.count, last, pickled
                )
        except BaseException:
            self._let_go()
            raise
        finally:
            workers.close()
        # an item of no rank's plan: DCP carries lists of results, and this one belongs to none of the others
        report = WriteResult(MetadataIndex(""), 0, files)
        done: Future[list[WriteResult]] = Future()
        done.set_result([report, *(WriteResult(write.index, 0, found) for write, found in stored)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pending = self._pending
        assert pending is not None
        with _failing(self._target, self._number()):
            try:
                files: list[RankFiles] = [found[0].storage_data for found in results]
                for each in files:
                    self._gather(pending, each)
                self._write_head(pending, files, _tree(metadata, results))
                pending.commit()
            except BaseException:
                self._let_go()
                raise
        self._pending = None

    # ---- the commit ------------------------------------------------------------------------------------------------

    def _gather(self, pending: PendingDirectory, files: RankFiles) -> None:
        """Move what a rank has written into the directory that is committed."""
        if files.directory != pending.path:
            for name, _ in files.names():
                self._store.rename(f"{files.directory}/{name}", pending.file(name))
            with suppress(OSError):
                self._store.remove_directory(files.directory)
        for name, size in files.names():
            found = os.stat(pending.file(name)).st_size  # noqa: PTH116
            if found != size:
                raise OSError(f"{name} has {found} bytes here, and {size} where it was written")

    def _write_head(self, pending: PendingDirectory, files: list[RankFiles], tree: Any) -> None:
        blobs = [blob for each in files for blob in each.blobs]
        workers = Workers(1)
        try:
            saving = Saving(self._store, workers, [], [], None)
            head = new_head(self._number(), self._metrics, len(files), blobs)
            if trees := [each.tree for each in files if each.tree is not None]:
                head = structs.replace(head, trees=trees)
            saving.write_rest(pending, head, tree, [named for each in files for named in each.maps])
        finally:
            workers.close()

    @property
    def _target(self) -> str:
        return os.path.abspath(self.checkpoint_id)  # noqa: PTH100  # a link at the target is replaced, not followed

    def _number(self) -> int:
        found = _STEP.findall(Path(self._target).name)
        return self._step if self._step is not None else int(found[-1]) if found else 0

    def _let_go(self) -> None:
        """Remove what a save that did not come to its end has written here; whoever committed it has moved it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.abandon()


def _warn_of_pickle(path: str, value: Any) -> None:
    warnings.warn(
        f"The value at {path!r} is a {type(value).__module__}.{type(value).__qualname__}, which is pickled: it loads"
        " only with unpickle=True.",
        UserWarning,
        stacklevel=2,
    )


@contextmanager
def _failing(target: str, step: int) -> Iterator[None]:
    """Turn errors of the file system into one that says what became of the checkpoint."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointSaveError(
            f"Saving the checkpoint of step {step} to {target!r} failed: {type(error).__name__}: {error}. What was"
            " there before is intact; free space or fix the permissions of the directory, or give another one.",
            path=target,
            step=step,
        ) from error


def _tree(metadata: Metadata, results: list[list[WriteResult]]) -> dict[str, Any]:
    """The nested state, from where each rank says that it has stored its items."""
    refs: dict[tuple[str, Any], TensorRef] = {}
    values: dict[str, Any] = _own_values([found[0].storage_data for found in results])
    first = 0
    for found in results:
        files: RankFiles = found[0].storage_data
        numbers = range(first, first + len(files.blobs))
        for result in found[1:]:
            stored: Stored = result.storage_data
            if stored.tree is not None:
                values[result.index.fqn] = codec.renumbered(codec.decode(stored.tree, result.index.fqn), numbers)
            elif stored.ref is not None:
                refs[result.index.fqn, result.index.offset] = codec.renumbered(stored.ref, numbers)
        first += len(files.blobs)
    paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    described = metadata.state_dict_metadata
    keys = [*(key for key in paths if key in described), *(key for key in described if key not in paths)]
    return nest((paths.get(key, (key,)), _node(key, described[key], refs, values)) for key in keys)


def _own_values(files: list[RankFiles]) -> dict[str, Any]:
    """The places of the `PerRank` values, which all ranks must have."""
    if len({each.own for each in files}) > 1:
        differ = sorted({key for each in files for key in each.own if any(key not in other.own for other in files)})
        raise MisconfigurationException(f"Not all ranks have the PerRank values {differ}: give them on every rank.")
    return {key: RanksRef(number) for number, key in enumerate(files[0].own)}


def _node(key: str, described: Any, refs: dict[tuple[str, Any], TensorRef], values: dict[str, Any]) -> Any:
    if not isinstance(described, TensorStorageMetadata):
        return values[key]
    found = [ref for chunk in described.chunks if (ref := refs.get((key, chunk.offsets))) is not None]
    if len(found) == 1 and described.chunks[0].sizes == described.size:
        return found[0]
    return PartsRef(*zip(*found, strict=True))
