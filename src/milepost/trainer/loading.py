"""When the loaders were asked for, so that a resumed run asks for them under the same conditions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from milepost.data.rng import RngState, isolated_rng

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer


@dataclass(frozen=True)
class Loading:
    """The epoch, and the random state, in which ``train_dataloader`` or ``val_dataloader`` was called.

    With `reload_dataloaders_every_n_epochs` loaders may depend on the epoch; and many a loader is built on a random
    split.
    """

    epoch: int
    rng: RngState
    resting: Any = None  # of a checkpoint: the loaders' state between two epochs

    @classmethod
    def now(cls, epoch: int) -> Loading:
        return cls(epoch, RngState.capture())

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "rng": self.rng.state_dict()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Loading:
        return cls(int(state["epoch"]), RngState.from_state_dict(state["rng"]), state["resting"])

    @contextmanager
    def repeated(self, trainer: Trainer) -> Iterator[None]:
        """Inside, ``current_epoch`` and the random state are those of that time."""
        counts = trainer.fit_loop.progress.epoch.current
        completed, counts.completed = counts.completed, self.epoch
        try:
            with isolated_rng():
                self.rng.restore()
                yield
        finally:
            counts.completed = completed
