"""How several ranks agree on a save: through the rendezvous store, by polling; no collective is called.

A rank that does not come, hangs or dies cannot hang the others: whoever waits for a rank watches a count in the store
that goes up while that rank gets on with it, and gives up where it stands still for the deadline. The store is used
through a connection of its own and from a thread of its own, so that a store that does not answer hangs neither.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import xxhash

from milepost import _distributed
from milepost.format.manifest import Blob, Stored

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_T = TypeVar("_T")
_FIRST_PAUSE_SECONDS = 0.002
_LONGEST_PAUSE_SECONDS = 0.1
_PULSE_SECONDS = 0.5
_MAYBE = "rank 0 may have committed: see whether the checkpoint is there"


class RankFailure(Exception):
    """A save failed for a reason that lies with one rank.

    Attributes:
        rank: which.
    """

    def __init__(self, rank: int, cause: str) -> None:
        super().__init__(f"rank {rank}: {cause}")
        self.rank = rank
        self.cause = cause


class Begin(msgspec.Struct, frozen=True):
    """What rank 0 says first.

    Attributes:
        pending: name of the directory that everything is written into.
        structure: digest of what it saves.
    """

    pending: str
    structure: str


class Vote(msgspec.Struct, frozen=True):
    """What a rank has written, all of it durable; or why it has not.

    Attributes:
        error: None where it has.
        blobs: what the head will say of them.
        deltas: by place in `blobs`, the rows of the base that a delta holds.
        tree: of the values that are its own.
    """

    error: str | None = None
    blobs: list[Blob] = []
    deltas: dict[int, list[int]] = {}
    tree: Stored | None = None


class Outcome(msgspec.Struct, frozen=True):
    """How the save ended. Without an error it is committed."""

    error: str | None = None
    rank: int = 0


class _Line:
    """A connection of its own to the store, made and used by a thread of its own, which ends with it."""

    def __init__(self, store: Store) -> None:
        self.dead = False
        self._asked: queue.SimpleQueue[tuple[Callable[[Store], Any], Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(store, self._asked), name="milepost-votes", daemon=True).start()

    def ask(self, question: Callable[[Store], _T], seconds: float) -> _T:
        """Raises TimeoutError: the store does not answer; nor will this object ask it again."""
        if self.dead:
            raise TimeoutError("the rendezvous store has stopped answering")
        answer: Future[_T] = Future()
        self._asked.put((question, answer))
        try:
            return answer.result(seconds)
        except TimeoutError:
            self.close()
            raise TimeoutError(f"the rendezvous store has not answered for {seconds:g} s") from None

    def close(self) -> None:
        """Let the thread and its connection end, once the call that it waits for returns."""
        self.dead = True
        self._asked.put(None)


def _serve(store: Store, asked: queue.SimpleQueue[tuple[Callable[[Store], Any], Future[Any]] | None]) -> None:
    own: Store | None = None
    while (item := asked.get()) is not None:
        question, answer = item
        try:
            if own is None:
                own = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
            answer.set_result(question(own))
        except BaseException as error:
            answer.set_exception(error)
        del item, question, answer  # they hold the ranks, whose end is this thread's


class Ranks:
    """The ranks that save together.

    Args:
        store: through which they meet: all of them use the same one, and nobody else uses keys under ``milepost/``.
        rank, world_size: which of how many this is.
        deadline_seconds: how long a rank may go without getting on, or may be later than another one with its save.
    """

    def __init__(self, store: Store, rank: int, world_size: int, *, deadline_seconds: float = 60.0) -> None:
        self.rank = rank
        self.world_size = world_size
        self.deadline_seconds = deadline_seconds
        self._store = store
        self._line: _Line | None = None
        self._lock = threading.Lock()  # never held while the store is asked
        self._placing = threading.Lock()
        self._place = ""
        self._counts: dict[str, int] = {}

    @classmethod
    def of_process_group(cls, deadline_seconds: float = 60.0) -> Ranks | None:
        """Those of torch's default process group; None where there is none, one rank, or one that saves alone."""
        if _distributed.world_size() < 2 or _distributed.is_alone():
            return None
        from torch.distributed.distributed_c10d import _get_default_store

        store = _get_default_store()
        with _lock:
            known = _of_stores.get(id(store))
            if known is None or known._store is not store:
                known = cls(store, _distributed.rank(), _distributed.world_size())
                _of_stores.clear()  # an earlier process group's
                _of_stores[id(store)] = known
        known.deadline_seconds = deadline_seconds
        return known

    def meeting(self, what: str) -> Meeting:
        """A place to meet for what all ranks call `what`; where they meet for the same again, another one."""
        with self._lock:
            if self._line is not None and self._line.dead:  # the store may answer again: this save asks it anew
                self._line = None
            count = self._counts[what] = self._counts.get(what, 0) + 1
        return Meeting(self, f"{xxhash.xxh3_64_hexdigest(what.encode())}-{count}")

    def ask(self, question: Callable[[Store], _T]) -> _T:
        """Let the store answer. Raises TimeoutError, or what the store raises, where it does not."""
        with self._lock:
            if self._line is None:
                self._line = _Line(self._store)
                weakref.finalize(self, self._line.close).atexit = False
            line = self._line

        def placed(store: Store) -> _T:
            self._find_place(store)
            return question(store)

        return line.ask(placed, self.deadline_seconds)

    def _find_place(self, store: Store) -> None:
        """Each start of a process group counts its ranks anew: keys of an earlier one are not taken for ours."""
        with self._placing:  # a line before this one may still wait for the count
            if not self._place:
                place = _distributed.generation()
                before = store.add(f"{place}/ranks", 1) - 1
                self._place = f"{place}/{before // self.world_size}"


_of_stores: dict[int, Ranks] = {}
_lock = threading.Lock()


class Meeting:
    """One save of all ranks. Rank 0 begins it, collects the votes and announces the outcome."""

    def __init__(self, ranks: Ranks, name: str) -> None:
        self.ranks = ranks
        self._name = name
        self._left = False
        self._lock = threading.Lock()

    # ---- rank 0 ----------------------------------------------------------------------------------------------------

    def begin(self, begin: Begin, structure: list[list[Any]]) -> None:
        """Let the others begin."""
        self._set("structure", structure)
        self._set("begin", begin)

    def votes(self) -> list[Vote]:
        """Those of all other ranks, in their order.

        Raises:
            RankFailure: the first that has voted against, or that does not get on.
        """
        missing = set(range(1, self.ranks.world_size))
        found: dict[int, Vote] = {}
        watch = _Watch(self, missing)
        seen = 0
        for _ in self._turns():
            count = self._add("votes", 0)
            if count != seen:
                seen = count
                for rank in sorted(missing):
                    if (vote := self._get(f"vote/{rank}", Vote)) is not None:
                        missing.discard(rank)
                        found[rank] = vote
                        if vote.error is not None:
                            raise RankFailure(rank, vote.error)
            if not missing:
                return [found[rank] for rank in sorted(found)]
            watch.look(missing)
        raise AssertionError("it waits until the votes are there, or raises")

    def claim(self) -> None:
        """Ask last of all whether it may be committed: from then on nobody gives it up.

        Raises:
            RankFailure: one has, because rank 0 was not heard of for too long.
        """
        if self._add("claim", 1) != 1:
            rank = self._get("withdrawn", int) or 1
            raise RankFailure(rank, "it has given up, because rank 0 was not heard of for too long")

    def announce(self, outcome: Outcome) -> None:
        """Tell the others how it ended."""
        self._set("outcome", outcome)
        self._leave()

    # ---- the other ranks -------------------------------------------------------------------------------------------

    def begun(self) -> Begin:
        """Wait until rank 0 has begun.

        Raises:
            RankFailure: it has failed before, or does not come.
        """
        return self._wait_for("begin", Begin)

    def structure_of_first(self) -> list[list[Any]]:
        """What rank 0 saves."""
        return self._get("structure", list) or []

    def vote(self, vote: Vote) -> None:
        """Tell rank 0."""
        self._set(f"vote/{self.ranks.rank}", vote)
        self._add("votes", 1)

    def outcome(self) -> None:
        """Wait until rank 0 has committed.

        Raises:
            RankFailure: it has not, and will not. Only where rank 0 was not heard of since it began to commit, it may.
        """
        try:
            self._wait_for("outcome", Outcome)
        except RankFailure as failure:
            self.check()
            self._set("withdrawn", self.ranks.rank)
            if self._add("claim", 1) == 1:
                raise
            self._wait_for_commit(failure)
        except Exception as error:  # the store is gone, or does not answer: with rank 0's process, if that holds it
            raise RankFailure(self.ranks.rank, f"{_said(error)}; {_MAYBE}") from error
        self._leave()

    def _wait_for_commit(self, failure: RankFailure) -> None:
        """Rank 0 was late, but has begun to commit; or another rank has given up before this one."""
        try:
            self._wait_for("outcome", Outcome)
        except RankFailure as second:
            if second.cause != failure.cause:
                raise
            raise RankFailure(0, f"{second.cause}; {_MAYBE}") from None

    def check(self) -> None:
        """Raise RankFailure if the save has failed already on another rank."""
        ended = self._get("outcome", Outcome)
        if ended is not None and ended.error is not None:
            raise RankFailure(ended.rank, ended.error)

    # ---- any rank --------------------------------------------------------------------------------------------------

    def refuse(self, error: BaseException, said: Sequence[str] = (), answered: Sequence[str] = ()) -> None:
        """Tell the others that it has failed here, and leave. Never raises: that error is what matters."""
        if self._left:
            return
        rank, text = (error.rank, error.cause) if isinstance(error, RankFailure) else (self.ranks.rank, _said(error))
        with contextlib.suppress(Exception):
            if self.ranks.rank == 0:
                self._set("outcome", Outcome(text, rank))
            elif rank == self.ranks.rank:
                self.vote(Vote(text))
        self.leave(said, answered)

    def decided(self, mine: bool) -> bool:
        """What rank 0 has decided, which says `mine`. The others wait for it.

        Raises:
            RankFailure: it does not come.
        """
        if self.ranks.rank == 0:
            self._set("decision", mine)
            self._leave()
            return mine
        found = self._wait_for("decision", bool)
        self._leave()
        return found

    def say(self, key: str, value: Any) -> None:
        """Rank 0 lets the others hear something."""
        self._set(key, value)

    def hear(self, key: str, kind: type[_T]) -> _T:
        """What rank 0 says under `key`; it is waited for.

        Raises:
            RankFailure: it does not get on.
        """
        return self._wait_for(key, kind)

    def answer(self, key: str, value: Any) -> None:
        """Tell rank 0 what this rank has to say under `key`."""
        self._set(f"{key}/{self.ranks.rank}", value)
        self._add(f"{key}/count", 1)

    def answers(self, key: str, kind: type[_T]) -> dict[int, _T]:
        """To rank 0: what each of the others has to say under `key`; all are waited for.

        Raises:
            RankFailure: one of them does not get on.
        """
        missing = set(range(1, self.ranks.world_size))
        found: dict[int, _T] = {}
        watch, seen = _Watch(self, missing), 0
        for _ in self._turns():
            count = self._add(f"{key}/count", 0)
            for rank in sorted(missing) if count != seen else ():
                if (said := self._get(f"{key}/{rank}", kind)) is not None:
                    missing.discard(rank)
                    found[rank] = said
            seen = count
            if not missing:
                return found
            watch.look(missing)
        raise AssertionError("it waits until the answers are there, or raises")

    def leave(self, said: Sequence[str] = (), answered: Sequence[str] = ()) -> None:
        """This rank reads nothing more of it. What was said and answered under these keys is taken away by the last."""
        ends = ["count", *range(self.ranks.world_size)]
        self._leave([*said, *(f"{key}/{end}" for key in answered for end in ends)])

    @contextmanager
    def pulse(self, progress: Callable[[], int], stop: Callable[[str], None]) -> Iterator[None]:
        """Show the others, as long as this lasts, that this rank gets on: whenever the number `progress` has changed.

        Args:
            stop: called with the reason where rank 0 has given up meanwhile.
        """
        over = threading.Event()

        def beat() -> None:
            shown = -1
            with contextlib.suppress(Exception):
                while not over.is_set():
                    if (now := progress()) != shown:
                        shown = now
                        self.get_on()
                    with self._lock:  # as in get_on: to get a key that the last rank takes away would block
                        ended = self._get("outcome", Outcome) if self.ranks.rank and not self._left else None
                    if ended is not None and ended.error:
                        stop(f"rank {ended.rank}: {ended.error}")
                        return
                    over.wait(_PULSE_SECONDS)

        thread = threading.Thread(target=beat, name="milepost-pulse", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(self.ranks.deadline_seconds)

    def get_on(self) -> None:
        """Show that this rank gets on with it."""
        with self._lock:  # not after the last rank has left and taken the keys away
            if not self._left:
                self._add(f"progress/{self.ranks.rank}", 1)

    def progress_of(self, rank: int) -> int:
        """A number that goes up while the rank gets on with it."""
        return self._add(f"progress/{rank}", 0)

    # ---- waiting ---------------------------------------------------------------------------------------------------

    def _wait_for(self, key: str, kind: type[_T]) -> _T:
        watch = _Watch(self, {0})
        for _ in self._turns():
            if (found := self._get(key, kind)) is not None:
                if isinstance(found, Outcome) and found.error is not None:
                    raise RankFailure(found.rank, found.error)
                return found
            self.check()
            watch.look({0})
        raise AssertionError("it waits until it is there, or raises")

    def _turns(self) -> Iterator[None]:
        """Turns of a waiting loop, with longer and longer pauses; rank 0 shows in them that it is there."""
        pause, shown = _FIRST_PAUSE_SECONDS, 0.0
        while True:
            yield
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE_SECONDS)
            if self.ranks.rank == 0 and (now := time.monotonic()) - shown > _PULSE_SECONDS:
                shown = now
                self.get_on()

    # ---- the store -------------------------------------------------------------------------------------------------

    def _key(self, key: str) -> str:
        return f"{self.ranks._place}/{self._name}/{key}"

    def _set(self, key: str, value: Any) -> None:
        data = msgspec.json.encode(value).decode()
        self.ranks.ask(lambda store: store.set(self._key(key), data))

    def _get(self, key: str, kind: type[_T]) -> _T | None:
        def get(store: Store) -> bytes | None:
            return store.get(self._key(key)) if store.check([self._key(key)]) else None

        data = self.ranks.ask(get)
        return None if data is None else msgspec.json.decode(data, type=kind)

    def _add(self, key: str, number: int) -> int:
        return int(self.ranks.ask(lambda store: store.add(self._key(key), number)))

    def _leave(self, more: Sequence[str] = ()) -> None:
        """This rank reads nothing more of it. The last one to leave takes the keys away.

        Never raises: what was agreed stands, also where the process that holds the store has ended since.
        """
        with self._lock:
            if self._left:
                return
            self._left = True
        with contextlib.suppress(Exception):
            if self._add("left", 1) == self.ranks.world_size:
                self._take_away(more)

    def _take_away(self, more: Sequence[str]) -> None:
        ranks = range(self.ranks.world_size)
        keys = ["structure", "begin", "outcome", "decision", "votes", "claim", "withdrawn", "left"]
        keys += [f"{kind}/{rank}" for kind in ("vote", "progress") for rank in ranks]
        keys += more

        def remove(store: Store) -> None:
            for key in keys:
                store.delete_key(self._key(key))

        self.ranks.ask(remove)


class _Watch:
    """Finds out which of the ranks that are waited for do not get on."""

    def __init__(self, meeting: Meeting, ranks: set[int]) -> None:
        self._meeting = meeting
        self._since = time.monotonic()
        self._looked = self._since
        self._seen = dict.fromkeys(ranks, (0, self._since))

    def look(self, missing: set[int]) -> None:
        """Raises RankFailure: one has not got on for the deadline."""
        now, deadline = time.monotonic(), _distributed.patience(self._meeting.ranks.deadline_seconds)
        if now - self._looked < min(_PULSE_SECONDS, deadline / 4):
            return
        self._looked = now
        for rank in sorted(missing):
            count, since = self._seen[rank]
            if (found := self._meeting.progress_of(rank)) != count:
                self._seen[rank] = (found, now)
            elif now - since > deadline:
                begun = "has not got on" if count else "has not come to this save"
                raise RankFailure(rank, f"it {begun} for {deadline:g} s; it has been killed, or hangs")


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
