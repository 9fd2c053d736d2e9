"""The training batches of a fit: when loaders are asked for, and the stream over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from milepost.data.rng import RngState, isolated_rng
from milepost.trainer.loading import Loading
from milepost.trainer.progress import Phase
from milepost.trainer.sources import training_loaders, training_stream

if TYPE_CHECKING:
    from milepost.data.stream import BatchStream
    from milepost.trainer.loop import FitLoop


class TrainingData:
    """Holds the stream of `loop`, from when the loaders are first asked for until the next fit."""

    def __init__(self, loop: FitLoop) -> None:
        self._loop = loop
        self.stream: BatchStream | None = None
        self.loading: Loading | None = None
        self.loading_to_repeat: Loading | None = None  # of a checkpoint
        self._loaders: Any = None

    def load(self, rebuild: bool = False) -> None:
        """Ask for the loaders once in a fit, and again where `reload_dataloaders_every_n_epochs` says so.

        With `rebuild` the stream over them is made anew: the seed of the data may have become known since.
        """
        loop = self._loop
        epoch, every = loop.progress.epoch.current.processed, loop.trainer.reload_dataloaders_every_n_epochs
        due = bool(every) and self.loading is not None and epoch - self.loading.epoch >= every
        again, self.loading_to_repeat = self.loading_to_repeat, None
        if not (rebuild or due or self.loading is None or again is not None):
            return
        if again is not None:
            self._load_again(again, due=bool(every) and epoch - again.epoch >= every)
        else:
            if self.loading is None or due:
                self.loading = Loading.now(epoch)
                self._loaders = training_loaders(loop.trainer)
            self._build_stream()
        if self.stream is not None:
            loop.pace.set_batches(self.stream.num_batches)

    def _load_again(self, loading: Loading, due: bool) -> None:
        """Resumed: get the loaders that the run had, or, where it was about to ask for new ones, those."""
        loop = self._loop
        if due and loop.phase is Phase.BETWEEN_EPOCHS and loop.rng_state is not None:
            self.loading = Loading(loop.progress.epoch.current.processed, loop.rng_state)
            with isolated_rng():
                loop.rng_state.restore()
                self._loaders = training_loaders(loop.trainer)
                self._build_stream()
                loop.rng_state = RngState.capture()
            return
        with loading.repeated(loop.trainer):
            self._loaders = training_loaders(loop.trainer)
            self._build_stream()
        self.loading = loading
        if self.stream is not None and loading.resting is not None:
            self.stream.load_resting_state(loading.resting)

    def _build_stream(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream = training_stream(self._loop.trainer, self._loaders)

    def forget(self) -> None:
        """A new fit asks for its own loaders."""
        if self.stream is not None:
            self.stream.close()
        self.stream, self._loaders, self.loading = None, None, None
