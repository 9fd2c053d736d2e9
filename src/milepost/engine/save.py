"""One save, from a flattened state to a committed directory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec

from milepost.engine import planner
from milepost.engine.collector import collector_paused
from milepost.engine.commit import Identity, PendingDirectory, identity
from milepost.engine.planner import Earlier
from milepost.engine.requests import CHUNK_BYTES, BlobPlan, Image
from milepost.engine.staging import part_of
from milepost.engine.state import Flattened
from milepost.engine.writer import BlobWriting, Workers, digests_of, piece_digests
from milepost.format import codec, manifest
from milepost.format.layout import PIECE_BYTES, piece_count
from milepost.format.manifest import Blob, Head, Stored
from milepost.storage.store import Store


@dataclass(frozen=True)
class Committed:
    """What is remembered of a commit, so that the next save can use it again.

    Attributes:
        identities: of its files by name: another process may have put another checkpoint at the path since.
    """

    path: str
    head: Head
    blobs: tuple[Earlier, ...]
    identities: Mapping[str, Identity]

    def group(self, name: str) -> list[Earlier]:
        return [earlier for earlier in self.blobs if earlier.blob.group == name]


@dataclass(frozen=True)
class _Part:
    """A blob of the new checkpoint: linked from an earlier one, or to be written.

    Attributes:
        rows: of its base, where it is a delta.
    """

    name: str
    plan: BlobPlan
    image: Image | None
    link: Earlier | None
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """A blob that is there and durable; its `rows` as in a `_Part`."""

    earlier: Earlier
    rows: tuple[int, ...] | None


class Place(Protocol):
    """The directory that a save writes into."""

    def file(self, name: str) -> str:
        """The path of a file in it."""


class Saving:
    """Writes one state to one target directory.

    Args:
        plans: with this save's tensors.
        images: for each plan its bytes: staged, or still in the tensors.
        last: what may be linked.
        got_on: called, by any thread, whenever a little was read or compared, for which the store is not called.
    """

    def __init__(
        self,
        store: Store,
        workers: Workers,
        plans: Sequence[BlobPlan],
        images: Sequence[Image],
        last: Committed | None,
        got_on: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._got_on = got_on
        self._workers = workers
        self._plans = plans
        self._images = images
        self._last = last
        self._known = {f"{last.path}/{name}": found for name, found in last.identities.items()} if last else {}

    def run(self, flattened: Flattened, target: str, step: int, metrics: Mapping[str, float]) -> Committed:
        """Write and commit, as one rank. What is at `target` is replaced in one step.

        Raises:
            OSError: nothing was committed, and nothing is left behind.
        """
        parts = self._all_parts()
        pending = PendingDirectory(self._store, target)
        try:
            blobs = [written.earlier for written in self._write_blobs(pending, parts, msgspec.UNSET)]
            with collector_paused():
                tree = flattened.tree(self.places(blobs).__getitem__)
            head = new_head(step, metrics, 1, [earlier.blob for earlier in blobs])
            head = self.write_rest(pending, head, tree, maps_of(blobs))
            identities = {name: identity(pending.file(name)) for name in head.files()}
            pending.commit()
        except BaseException:
            pending.abandon()
            raise
        blobs = [replace(b, path=f"{target}/{b.blob.name}") for b in blobs]
        return Committed(target, head, tuple(blobs), identities)

    def blobs(self, place: Place, rank: int) -> list[Written]:
        """Write the blobs of one of several ranks, and their indexes."""
        return self._write_blobs(place, self._all_parts(), rank)

    # ---- what can be used again ------------------------------------------------------------------------------------

    def _all_parts(self) -> list[_Part]:
        planned = zip(self._plans, self._images, strict=True)
        return [part for plan, image in planned for part in self._parts(plan, image)]

    def _parts(self, plan: BlobPlan, image: Image) -> list[_Part]:
        whole = [_Part(plan.name, plan, image, None)]
        earlier = self._last.group(plan.group) if self._last is not None else []
        if not earlier or not planner.same_structure(plan, earlier[0].index):
            return whole
        base = earlier[0]
        if base.blob.saves >= planner.MAX_LINKS or self._mostly_changed(plan, image, base):
            return whole
        digests = digests_of(image, self._workers, self._got_on)
        pieces = planner.changed_pieces(base.index, digests)
        base_name, delta_name = planner.delta_names(plan)
        if not self._sound(base):
            return whole
        if not pieces:
            return [_Part(plan.name, plan, image, base)]
        rows = self._changed_rows(plan, image, base, pieces)
        if rows is None or not planner.worth_a_delta(plan, rows):
            return whole
        if not rows:  # only the padding differs: it cannot, but a link would then be wrong
            return whole
        delta = planner.part_of_plan(plan, delta_name, rows)
        delta_image = part_of(delta, plan, image)
        link = None
        if len(earlier) > 1 and planner.same_structure(delta, earlier[1].index):
            again = earlier[1].blob.saves < planner.MAX_LINKS and self._sound(earlier[1])
            if again and digests_of(delta_image, self._workers, self._got_on) == earlier[1].index.digests:
                link = earlier[1]
        return [_Part(base_name, plan, image, base), _Part(delta_name, delta, delta_image, link, tuple(rows))]

    def _mostly_changed(self, plan: BlobPlan, image: Image, base: Earlier) -> bool:
        """Whether a look at a few places finds most of them changed: then all is written without a closer look."""
        same = 0
        with _reading(base.path) as stored:
            if stored < 0:
                return True
            places = planner.samples(len(plan.layout.header), image.size)
            for start, stop in places:
                same += self._equal(stored, image, start, stop)
        return same < len(places) / 4

    def _equal(self, stored: int, image: Image, start: int, stop: int) -> bool:
        self._got_on()
        return os.pread(stored, stop - start, start) == image.view(start, stop, self._workers.buffer())[: stop - start]

    def _changed_rows(self, plan: BlobPlan, image: Image, base: Earlier, pieces: list[int]) -> list[int] | None:
        with _reading(base.path) as stored:
            if stored < 0:
                return None
            compared = _PieceComparison(stored, image, self._workers.buffer(), self._got_on)
            return planner.changed_entries(plan.layout.entries, pieces, PIECE_BYTES, compared.equal)

    def _sound(self, earlier: Earlier) -> bool:
        """Whether the stored blob may be linked once more: from time to time it is read and verified first."""
        if earlier.blob.verified < planner.VERIFY_EVERY:
            return True
        with suppress(OSError), open(earlier.path, "rb") as file:  # noqa: PTH123
            for start in range(0, earlier.blob.bytes, CHUNK_BYTES):
                data = memoryview(file.read(CHUNK_BYTES))
                first = start // PIECE_BYTES
                expected = earlier.index.digests[32 * first : 32 * (first + piece_count(len(data)))]
                if piece_digests(data) != expected:
                    return False
                self._got_on()
            return True
        return False

    # ---- writing ---------------------------------------------------------------------------------------------------

    def _write_blobs(self, pending: Place, parts: list[_Part], rank: int | msgspec.UnsetType) -> list[Written]:
        linked: dict[str, Earlier] = {}
        to_write: list[_Part] = []
        for part in parts:
            if part.link is not None and self._linked(part.link.path, pending.file(part.name)):
                linked[part.name] = part.link
            else:
                to_write.append(part)
        written = BlobWriting(self._store, self._workers).run(
            [(pending.file(part.name), part.image) for part in to_write if part.image is not None]
        )
        digests = {part.name: found for part, found in zip(to_write, written, strict=True)}
        blobs = []
        for part in parts:
            old = linked.get(part.name)
            with collector_paused():
                index = old.index if old is not None else planner.index_of(part.plan, digests[part.name])
            name = f"{part.name.removesuffix('.safetensors')}.index.json"
            known = None if old is None else (str(Path(old.path).parent), old.blob.index)
            stored = self.small(pending, name, manifest.encode_index(index), known)
            saves = old.blob.saves + 1 if old is not None else 0
            verified = 0 if old is None or old.blob.verified >= planner.VERIFY_EVERY else old.blob.verified + 1
            blob = Blob(part.name, index.bytes, stored, part.plan.group, saves, verified, rank)
            blobs.append(Written(Earlier(pending.file(part.name), blob, index), part.rows))
        return blobs

    def write_rest(self, place: Place, head: Head, tree: Any, maps: Sequence[tuple[str, bytes]] = ()) -> Head:
        """Write the tree, the maps, and the head, last; `head` is without them."""
        with collector_paused():
            data = codec.encode(tree)
        last = self._last
        known = {} if last is None else {old.name: (last.path, old) for old in (last.head.tree, *last.head.maps)}
        whole = msgspec.structs.replace(
            head,
            tree=self.small(place, manifest.TREE_NAME, data, known.get(manifest.TREE_NAME)),
            maps=[self.small(place, name, text, known.get(name)) for name, text in maps],
        )
        stored, listing = manifest.encode_listing(whole)
        if listing is not None:
            self._write(place.file(manifest.LISTING_NAME), listing)
        self._write(place.file(manifest.HEAD_NAME), manifest.encode_head(stored))
        return msgspec.structs.replace(whole, listing=stored.listing)

    def places(self, blobs: list[Earlier]) -> dict[int, tuple[int, int]]:
        """Blob and row of each leaf. A delta comes after its base, and takes the names it holds."""
        by_name: dict[tuple[str, str], tuple[int, int]] = {}
        for number, earlier in enumerate(blobs):
            group = earlier.blob.group
            by_name.update({(group, name): (number, row) for row, name in enumerate(earlier.index.names)})
        return {leaf.number: by_name[plan.group, leaf.name] for plan in self._plans for leaf in plan.leaves}

    def small(self, pending: Place, name: str, data: bytes, known: tuple[str, Stored] | None) -> Stored:
        """Write a small file, or link the one that is `known` (directory, file) where it says the same."""
        stored = Stored(name, len(data), manifest.digest(data))
        if known is not None:
            directory, old = known
            same = (old.bytes, old.xxh3_128) == (stored.bytes, stored.xxh3_128)
            if same and self._linked(f"{directory}/{old.name}", pending.file(name)):
                return stored
        self._write(pending.file(name), data)
        return stored

    def _linked(self, source: str, target: str) -> bool:
        """Whether the link could be made. Where not (too many, another device, gone, not supported), it is written.

        So it is where the link turns out to be one to another file: somebody has replaced the last checkpoint.
        """
        try:
            self._store.link(source, target)
        except OSError:
            return False
        if identity(target) == self._known.get(source):
            return True
        self._store.remove_file(target)
        return False

    def _write(self, path: str, data: bytes) -> None:
        descriptor = self._store.create(path, 0)
        try:
            self._store.write(descriptor, memoryview(data), 0)
        except BaseException:
            self._store.abandon(descriptor)
            raise
        self._store.finish(descriptor, len(data))


def new_head(step: int, metrics: Mapping[str, float], world_size: int, blobs: list[Blob]) -> Head:
    """The head of a save, as of now, its tree yet to be written."""
    return Head(
        format=manifest.FORMAT,
        version=manifest.VERSION,
        step=step,
        time=time.time(),
        metrics=manifest.metrics_as_data(metrics),
        world_size=world_size,
        blobs=blobs,
        tree=Stored(manifest.TREE_NAME, 0, ""),
    )


class _PieceComparison:
    """Compares ranges with the stored bytes; each piece is read once for all the tensors in it, which come in order."""

    def __init__(self, stored: int, image: Image, buffer: memoryview, got_on: Callable[[], None]) -> None:
        self._stored = stored
        self._got_on = got_on
        self._image = image
        self._buffer = buffer
        self._begin = -1
        self._old = b""
        self._new = memoryview(b"")

    def equal(self, start: int, stop: int) -> bool:
        """Whether the bytes of a range, which lies in one piece, are those that are stored."""
        begin = start // PIECE_BYTES * PIECE_BYTES
        if begin != self._begin:
            end = min(begin + PIECE_BYTES, self._image.size)
            self._begin, self._old = begin, os.pread(self._stored, end - begin, begin)
            self._new = self._image.view(begin, end, self._buffer)
            self._got_on()
        return self._old[start - begin : stop - begin] == self._new[start - begin : stop - begin]


@contextmanager
def _reading(path: str) -> Iterator[int]:
    """A descriptor to read from, or -1 where the file is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield -1
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def maps_of(blobs: list[Earlier]) -> list[tuple[str, bytes]]:
    """Which file holds which tensor, in the form other tools read, for each group that lies in two blobs."""
    groups: dict[str, list[Earlier]] = {}
    for earlier in blobs:
        groups.setdefault(earlier.blob.group, []).append(earlier)
    made = []
    for members in groups.values():
        if len(members) == 1:
            continue
        where = {name: earlier.blob.name for earlier in members for name in earlier.index.names}
        total = sum(entry.size for entry in map(members[0].index.entry, range(len(members[0].index.names))))
        stem = members[0].blob.name.removesuffix("-00001-of-00002.safetensors")
        data = msgspec.json.encode({"metadata": {"total_size": total}, "weight_map": where})
        made.append((f"{stem}.safetensors.index.json", data))
    return made
