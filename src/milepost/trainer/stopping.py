"""On several ranks: all stop at the same step, whichever of them was sent a signal.

A signal sets a flag on its rank. At its next boundary between batches that rank writes into the rendezvous store after
which batch to stop. All look there after each optimizer step, which takes one question to the store and is no
collective. Gradients are what makes them agree: no rank finishes a step behind that batch before the one that wrote
has computed its gradients for it, and by then it had written. So all stop after the first step behind that batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from milepost import _distributed

if TYPE_CHECKING:
    from milepost.trainer.signals import SignalFlags


class StopTogether:
    """Finds out after which batch all ranks stop. One rank stops where it is."""

    _runs: ClassVar[int] = 0  # of all Trainers: the ranks of a program make the same ones, in one order

    def __init__(self, signals: SignalFlags) -> None:
        self._signals = signals
        self._store: Any = None
        self._key = ""
        self._told = False

    def begin(self) -> None:
        """A run begins, on all ranks."""
        self._store, self._told = None, False
        StopTogether._runs += 1
        if _distributed.world_size() > 1:
            self._store = _distributed.store()
            self._key = f"{_distributed.generation()}/stop/{StopTogether._runs}"

    def due(self, batch: int, stepped: bool) -> bool:
        """Whether the run is to stop here.

        Args:
            batch: how many batches the run has had.
            stepped: whether the optimizers have just stepped, on all ranks.
        """
        if self._store is None:
            return bool(self._signals.received)
        if self._signals.received and not self._told:
            self._told = True
            if self._store.add(f"{self._key}/asked", 1) == 1:
                self._store.set(self._key, f"{batch} {self._signals.received[0]}")
        if not stepped or not self._store.check([self._key]):
            return False
        last, number = map(int, self._store.get(self._key).split())
        if batch <= last:
            return False
        if not self._signals.received:
            self._signals.told.append(number)
        return True
