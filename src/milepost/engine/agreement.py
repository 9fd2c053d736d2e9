"""Which checkpoint is restored: the newest good one, and with several ranks the same one on all of them.

Rank 0 names a step; every rank restores what it holds of it, and answers how that went; rank 0 says what becomes of it.
No rank verifies what another one reads, and none calls a collective.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

from milepost.engine.votes import Meeting, RankFailure, Ranks
from milepost.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    RankFailedError,
)

Steps = Callable[[], list[int]]
Restore = Callable[[int], str]  # returns which commit of the step it was: a digest of its head


def newest_good(restore: Restore, steps: Steps) -> int:
    """Restore the newest checkpoint that is not damaged. Returns its step, 0 where there is none.

    Raises:
        CheckpointCorruptError: there are some, and all are damaged.
    """
    first_error: CheckpointCorruptError | CheckpointFormatError | None = None
    candidates = steps()
    while candidates:
        candidate = candidates.pop()
        try:
            restore(candidate)
        except CheckpointNotFoundError:  # removed by somebody since it was listed, who may have saved newer ones
            candidates = steps()
        except (CheckpointCorruptError, CheckpointFormatError) as error:
            first_error = first_error or error
            _pass_over(candidate, str(error))
        else:
            return candidate
    if first_error is not None:
        raise first_error
    return 0


class _Went(msgspec.Struct, frozen=True):
    """How a rank got on with a step, and what rank 0 makes of all such answers."""

    how: Literal["well", "damaged", "gone", "failed", "replaced"]
    why: str = ""
    rank: int = 0
    commit: str = ""


_LOOKS = 5
_PAUSE_SECONDS = 0.5
_WORST = ("failed", "damaged", "gone", "well")


class AgreedSearch:
    """A restore that all ranks do together.

    Args:
        name: what they restore; the same on all.
        steps: those that there are, in order. Only rank 0's are asked for.
        progress: a number that goes up while this rank lists or reads.
    """

    def __init__(self, ranks: Ranks, name: str, steps: Steps, progress: Callable[[], int]) -> None:
        self._ranks = ranks
        self._name = name
        self._steps = steps
        self._progress = progress
        self._number = 0  # of the round

    def run(self, restore: Restore, only: int | None = None) -> int:
        """Restore the newest checkpoint that is not damaged for any rank, or the one of the step `only`.

        Returns:
            Its step; 0 where there is none.

        Raises:
            CheckpointCorruptError, CheckpointNotFoundError: as `newest_good`, also where only another rank found it.
            RankFailedError: another rank could not restore what is sound, or did not take part in time.
        """
        meeting = self._ranks.meeting(f"{self._name} restore")
        try:
            step = self._rounds(meeting, restore, only)
        except RankFailure as failure:
            meeting.refuse(failure, *self._keys())
            raise RankFailedError(
                f"Restoring from {self._name} failed, because rank {failure.rank} failed: {failure.cause}. All ranks"
                " must call restore, with the same arguments.",
                rank=failure.rank,
            ) from None
        return step

    def _rounds(self, meeting: Meeting, restore: Restore, only: int | None) -> int:
        named = _Named(self._steps, only)
        first: tuple[BaseException | None, _Went] | None = None
        while True:
            step = self._step(meeting, named)
            if step is None:
                meeting.leave(*self._keys())
                return self._none_is_good(first)
            mine, verdict = self._one(meeting, step, restore)
            if verdict.how == "damaged" and only is None:
                first = first or (mine, verdict)
                _pass_over(step, verdict.why)
            elif verdict.how != "replaced" and (verdict.how != "gone" or only is not None):
                meeting.leave(*self._keys())
                if verdict.how == "well":
                    return step
                raise mine or _of_other(verdict, step)
            named.went(step, verdict)
            self._number += 1

    def _step(self, meeting: Meeting, named: _Named) -> int | None:
        """The one that rank 0 names now; None where there is no other."""
        if self._ranks.rank:
            step = meeting.hear(f"step {self._number}", int)
            return None if step < 0 else step
        try:
            with meeting.pulse(self._progress, lambda why: None):  # sweeping what was left behind may take long
                found = named.next()
        except Exception as error:
            meeting.refuse(error, *self._keys())
            raise
        meeting.say(f"step {self._number}", -1 if found is None else found)
        return found

    def _one(self, meeting: Meeting, step: int, restore: Restore) -> tuple[BaseException | None, _Went]:
        """Restore one step. Returns what went wrong here, and what became of it on all ranks."""
        mine: BaseException | None = None
        with meeting.pulse(self._progress, lambda why: None):
            try:
                went = _Went("well", commit=restore(step))
            except Exception as error:
                mine, went = error, _went(error, self._ranks.rank)
        if self._ranks.rank:
            meeting.answer(f"went {self._number}", went)
            return mine, meeting.hear(f"verdict {self._number}", _Went)
        answers = {0: went, **meeting.answers(f"went {self._number}", _Went)}
        verdict = _verdict(answers)
        meeting.say(f"verdict {self._number}", verdict)
        return mine, verdict

    def _keys(self) -> tuple[list[str], list[str]]:
        """What was said and answered up to now; another rank may be a round further."""
        numbers = range(self._number + 2)
        return [f"{what} {n}" for n in numbers for what in ("step", "verdict")], [f"went {n}" for n in numbers]

    def _none_is_good(self, first: tuple[BaseException | None, _Went] | None) -> int:
        if first is None:
            return 0
        mine, verdict = first
        raise mine or CheckpointCorruptError(
            f"All checkpoints in {self._name} are damaged; of the newest, rank {verdict.rank} found: {verdict.why}"
        )


class _Named:
    """The steps in the order in which rank 0 names them."""

    def __init__(self, steps: Steps, only: int | None) -> None:
        self._steps = steps if only is None else lambda: [only]
        self._left: list[int] | None = None
        self._not_found: Counter[int] = Counter()

    def next(self) -> int | None:
        if self._left is None:
            self._left = self._steps()
        return self._left.pop() if self._left else None

    def went(self, step: int, verdict: _Went) -> None:
        """It was no success. One that was removed meanwhile is no reason to go further back: there may be newer ones.

        Raises:
            RankFailure: rank 0 finds it, and another rank does not, or finds another commit each time.
        """
        if verdict.how in ("gone", "replaced"):
            self._left = None
            self._not_found[step] += 1
            if verdict.rank and self._not_found[step] > _LOOKS:
                what = "does not find the" if verdict.how == "gone" else "has not restored rank 0's"
                raise RankFailure(
                    verdict.rank, f"it {what} checkpoint of step {step}; is the directory on a shared disk?"
                )
            time.sleep(_PAUSE_SECONDS * (self._not_found[step] - 1))  # its file system may be behind


def _went(error: Exception, rank: int) -> _Went:
    if isinstance(error, CheckpointNotFoundError):
        return _Went("gone", str(error), rank)
    if isinstance(error, (CheckpointCorruptError, CheckpointFormatError)):
        return _Went("damaged", str(error), rank)
    return _Went("failed", f"{type(error).__name__}: {error}", rank)


def _verdict(answers: Mapping[int, _Went]) -> _Went:
    """What rank 0 makes of all ranks' answers: the worst of them, unless all went well with different commits."""
    worst = min(answers.values(), key=lambda each: (_WORST.index(each.how), each.rank))
    others = [rank for rank, each in sorted(answers.items()) if each.commit != answers[0].commit]
    if worst.how == "well" and others:
        return _Went("replaced", "it was replaced while it was restored", others[0])
    return worst


def _of_other(verdict: _Went, step: int) -> Exception:
    """What a rank raises whose own part was good."""
    if verdict.how == "failed":
        return RankFailedError(
            f"Rank {verdict.rank} cannot restore the checkpoint of step {step}: {verdict.why}", rank=verdict.rank
        )
    kind: type[CheckpointError] = CheckpointNotFoundError if verdict.how == "gone" else CheckpointCorruptError
    return kind(f"Rank {verdict.rank} found: {verdict.why}")


def _pass_over(step: int, why: str) -> None:
    warnings.warn(f"passing over the damaged checkpoint of step {step}: {why}", stacklevel=4)
