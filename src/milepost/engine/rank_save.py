"""One save of several ranks: each writes what is its own, rank 0 commits once all of that is durable."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import msgspec

from milepost.engine.collector import collector_paused
from milepost.engine.commit import Identity, PendingDirectory, identity, make_parents, sweep
from milepost.engine.rank_blobs import RankBlobs, file_name
from milepost.engine.rank_plan import difference
from milepost.engine.requests import BlobPlan, Image
from milepost.engine.save import Committed, Saving, Written, new_head
from milepost.engine.state import Flattened
from milepost.engine.votes import Begin, Meeting, Outcome, RankFailure, Vote
from milepost.engine.writer import Workers
from milepost.format import codec, manifest
from milepost.format.manifest import Blob, Head
from milepost.storage.store import Store

_LOOK_SECONDS = 0.05


class _Joined:
    """The pending directory that rank 0 has made, as another rank sees it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def file(self, name: str) -> str:
        return f"{self.path}/{name}"


class Watched:
    """Passes calls on to `store`, counts those that have returned, and refuses more once it was told to stop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._reason: str | None = None
        self.count = 0

    def stop(self, reason: str) -> None:
        """Let the next call fail: nobody wants any more what is being written."""
        self._reason = reason

    def get_on(self) -> None:
        """Count up: something was done that needed no call."""
        self.count += 1  # threads may count over each other: it need only change

    def _called(self) -> None:
        self.get_on()
        if self._reason is not None:
            raise InterruptedError(f"stopped: {self._reason}")

    def make_directory(self, path: str) -> None:
        self._store.make_directory(path)
        self._called()

    def create(self, path: str, size: int) -> int:
        self._called()
        return self._store.create(path, size)

    def write(self, descriptor: int, data: memoryview, offset: int) -> None:
        self._store.write(descriptor, data, offset)
        self._called()

    def finish(self, descriptor: int, size: int) -> None:
        self.count += 1
        self._store.finish(descriptor, size)

    def abandon(self, descriptor: int) -> None:
        self._store.abandon(descriptor)

    def link(self, source: str, target: str) -> None:
        self._called()
        self._store.link(source, target)

    def rename(self, source: str, target: str) -> None:
        self.count += 1
        self._store.rename(source, target)

    def exchange(self, one: str, other: str) -> None:
        self.count += 1
        self._store.exchange(one, other)

    def sync_directory(self, path: str) -> None:
        self.count += 1
        self._store.sync_directory(path)

    def remove_file(self, path: str) -> None:
        self.count += 1
        self._store.remove_file(path)

    def remove_directory(self, path: str) -> None:
        self._store.remove_directory(path)


class RankSaving:
    """Writes what this rank has of one state.

    Args:
        blobs: the plan of the state.
        plans: its blobs, with this save's tensors.
        images: for each plan its bytes.
    """

    def __init__(
        self,
        store: Store,
        workers: Workers,
        flattened: Flattened,
        blobs: RankBlobs,
        plans: Sequence[BlobPlan],
        images: Sequence[Image],
        last: Committed | None,
        meeting: Meeting,
    ) -> None:
        self._store = Watched(store)
        self._saving = Saving(self._store, workers, plans, images, last, self._store.get_on)
        self._flattened = flattened
        self._blobs = blobs
        self._meeting = meeting
        self._rank = meeting.ranks.rank
        self._written: list[Written] = []
        self._identities: dict[str, Identity] = {}

    def run(self, target: str, step: int, metrics: Mapping[str, float]) -> Committed:
        """Write, and wait until all is committed.

        Raises:
            RankFailure: another rank has failed, or was not heard of.
            OSError: this one has. In either case nothing is committed, unless rank 0 was not heard of at the very end.
        """
        try:
            with self._meeting.pulse(lambda: self._store.count, self._store.stop):
                head = self._first(target, step, metrics) if self._rank == 0 else self._other(target, step)
        except BaseException as error:
            self._meeting.refuse(error)
            raise
        blobs = tuple(replace(w.earlier, path=f"{target}/{w.earlier.blob.name}") for w in self._written)
        names = {name for earlier in blobs for name in (earlier.blob.name, earlier.blob.index.name)}
        if self._rank == 0:
            names |= {head.tree.name}
        return Committed(target, head, blobs, {name: self._identities[name] for name in names})

    # ---- rank 0 ----------------------------------------------------------------------------------------------------

    def _first(self, target: str, step: int, metrics: Mapping[str, float]) -> Head:
        make_parents(self._store, os.path.dirname(target))  # noqa: PTH120
        sweep(self._store, os.path.dirname(target))  # noqa: PTH120
        pending = PendingDirectory(self._store, target)
        try:
            begin = Begin(os.path.basename(pending.path), self._blobs.digest)  # noqa: PTH119
            self._meeting.begin(begin, self._blobs.structure)
            votes = [self._write(pending), *self._meeting.votes()]
            head = self._commit(pending, votes, step, metrics)
        except BaseException as error:
            self._meeting.refuse(error)  # before what the others still write into is taken away
            pending.abandon()
            raise
        with suppress(Exception):  # it is committed, whoever hears of it
            self._meeting.announce(Outcome())
        return head

    def _commit(
        self, pending: PendingDirectory, votes: Sequence[Vote], step: int, metrics: Mapping[str, float]
    ) -> Head:
        blobs: list[Blob] = []
        deltas: dict[int, list[int]] = {}
        for vote in votes:
            deltas.update({len(blobs) + number: rows for number, rows in vote.deltas.items()})
            blobs.extend(vote.blobs)
        head = new_head(step, metrics, self._meeting.ranks.world_size, blobs)
        trees = [vote.tree for vote in votes if vote.tree is not None]
        if trees:
            head = msgspec.structs.replace(head, trees=trees)
        with collector_paused():
            places = self._blobs.places(blobs, deltas)
            tree = self._flattened.tree(lambda leaf: places[self._blobs.numbers[leaf]])
            head = self._saving.write_rest(pending, head, tree)
        self._identities[head.tree.name] = identity(pending.file(head.tree.name))
        self._meeting.claim()
        pending.commit()
        return head

    # ---- the others ------------------------------------------------------------------------------------------------

    def _other(self, target: str, step: int) -> Head:
        try:
            return self._share(target, step)
        except RankFailure:
            raise
        except Exception:
            self._meeting.check()  # where rank 0 has given up, what is missing here now is no cause
            raise

    def _share(self, target: str, step: int) -> Head:
        begin = self._meeting.begun()
        if begin.structure != self._blobs.digest:
            differs = difference(self._meeting.structure_of_first(), self._blobs.structure)
            raise ValueError(
                f"the state of rank {self._rank} is not that of rank 0: {differs}. Give all ranks the same names,"
                " shapes and types, and wrap what differs in milepost.PerRank"
            )
        place = _Joined(f"{os.path.dirname(target)}/{begin.pending}")  # noqa: PTH120
        self._find(place.path)
        vote = self._write(place)
        self._store.sync_directory(place.path)
        self._meeting.vote(vote)
        self._meeting.outcome()
        return new_head(step, {}, self._meeting.ranks.world_size, list(vote.blobs))

    def _find(self, path: str) -> None:
        """A file system that several hosts share may show the new directory a little later."""
        until = time.monotonic() + self._meeting.ranks.deadline_seconds / 2
        while not os.path.isdir(path):  # noqa: PTH112
            self._meeting.check()
            if time.monotonic() > until:
                raise FileNotFoundError(
                    f"rank {self._rank} does not see {path!r}, which rank 0 has made: save to a directory that all"
                    " ranks share"
                )
            time.sleep(_LOOK_SECONDS)

    # ---- any rank --------------------------------------------------------------------------------------------------

    def _write(self, place: _Joined | PendingDirectory) -> Vote:
        """Write this rank's files, each durable; its vote."""
        self._written = self._saving.blobs(place, self._rank)
        blobs = [written.earlier.blob for written in self._written]
        names = [name for blob in blobs for name in (blob.name, blob.index.name)]
        self._identities = {name: identity(place.file(name)) for name in names}
        deltas = {n: list(written.rows) for n, written in enumerate(self._written) if written.rows is not None}
        tree = None
        if self._blobs.values:
            places = self._saving.places([written.earlier for written in self._written])
            data = codec.encode(self._flattened.own_tree(lambda leaf: places[self._blobs.own[leaf]]))
            tree = self._saving.small(place, file_name(manifest.TREE_NAME, self._rank), data, None)
        return Vote(None, blobs, deltas, tree)
