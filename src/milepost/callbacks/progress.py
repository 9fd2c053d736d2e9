"""Progress on the terminal."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live

from milepost.callbacks._progress_line import Progress, RichProgressBarTheme
from milepost.callbacks.callback import Callback
from milepost.errors import MisconfigurationException

if TYPE_CHECKING:
    from milepost.trainer.module import Module
    from milepost.trainer.trainer import Trainer


_BETWEEN_DRAWS_SECONDS = 0.1


class ProgressBar(Callback):
    """Derive from this to show progress your own way; the Trainer then adds no bar beside yours."""

    def __init__(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        """Show nothing from now on. The Trainer calls this on every rank but 0."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self._enabled = True

    @property
    def is_enabled(self) -> bool:
        """Whether anything is shown."""
        return self._enabled

    def get_metrics(self, trainer: Trainer, pl_module: Module) -> dict[str, int | str | float]:
        """What is shown beside the bar: the version of the run, then everything logged with ``prog_bar=True``."""
        version = trainer.logger.version if trainer.logger is not None else None
        first: dict[str, int | str | float] = {} if version is None else {"v_num": str(version)[-4:]}
        if isinstance(version, int):
            first["v_num"] = version
        return {**first, **trainer.progress_bar_metrics}

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without breaking the bar."""
        print(*args, **kwargs)

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if not trainer.is_global_zero:
            self.disable()


class RichProgressBar(ProgressBar):
    """One line with epoch, batches, time, time to go, speed and metrics; under it one for a validation while it runs.

    Drawn where the output is a terminal or a notebook, and not where ``CI`` is set; a log file stays clean. It is drawn
    ten times a second at most, and metrics are read off the device only then. A run that goes on inside an epoch begins
    at the batch where it goes on.

    Args:
        refresh_rate: batches between two redraws at least; 0 shows nothing.
        leave: keep the line of a finished epoch and begin a new one below.
        theme: styles.
        console_kwargs: passed to ``rich.console.Console``.
        console: where to draw; the standard output if None.
        clock: seconds, from any origin, by which the speed is measured.
    """

    def __init__(
        self,
        refresh_rate: int = 1,
        leave: bool = False,
        theme: RichProgressBarTheme = RichProgressBarTheme(),  # noqa: B008 - frozen
        console_kwargs: dict[str, Any] | None = None,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        if refresh_rate < 0:
            raise MisconfigurationException(f"refresh_rate is {refresh_rate!r} batches; give 0 (silent) or more")
        self.refresh_rate = refresh_rate
        self.leave = leave
        self.theme = theme
        self._console_kwargs = console_kwargs or {}
        self._console = console
        self._clock = clock
        self._live: Live | None = None
        self._main: Progress | None = None
        self._nested: Progress | None = None  # the validation inside a training epoch
        self._drawn = -math.inf

    @property
    def is_enabled(self) -> bool:
        return self._enabled and self.refresh_rate > 0 and (self._console is not None or _somebody_looks())

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self._live is None:
            print(*args, **kwargs)
        else:
            self._live.console.print(*args)

    # ---- drawing -------------------------------------------------------------------------------------------------

    def _begin(self, label: str, total: int | float, first: int = 0) -> None:
        """A loop begins. Its line takes the place of the last one."""
        if not self.is_enabled:
            return
        self._main, self._nested = Progress(label, total, self._clock(), first, first), None
        if self._live is None:
            console = self._console or Console(**self._console_kwargs)
            self._live = Live(console=console, auto_refresh=False, transient=False)
            self._live.start()

    def _advance(self, trainer: Trainer, pl_module: Module, done: int) -> None:
        line = self._nested or self._main
        if self._live is None or line is None:
            return
        line.done = done
        now, last = self._clock(), done >= line.total
        if not last and (done % self.refresh_rate or now - self._drawn < _BETWEEN_DRAWS_SECONDS):
            return
        self._draw(now, self.get_metrics(trainer, pl_module))

    def _draw(self, now: float, metrics: dict[str, int | str | float] | None = None) -> None:
        if self._live is None or self._main is None:
            return
        if metrics is not None:
            self._main.metrics = metrics
        width = self._live.console.width
        stopped = now if self._nested is None else self._nested.begun  # the time of a validation is not training's
        lines = [self._main.render(stopped, width, self.theme)]
        if self._nested is not None:
            lines.append(self._nested.render(now, width, self.theme))
        self._live.update(Group(*lines), refresh=True)
        self._drawn = now

    def _end(self, *, keep: bool) -> None:
        """No line is drawn any more; the last one stays on the screen with `keep`."""
        if self._live is not None:
            self._nested = None
            if keep:
                self._draw(self._clock())
            else:
                self._live.transient = True
            self._live.stop()
        self._live = self._main = self._nested = None
        self._drawn = -math.inf

    # ---- training ------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        if self._main is None:  # an epoch begins, or goes on midway
            self._begin_epoch(trainer, batch_idx)

    def _begin_epoch(self, trainer: Trainer, first: int) -> None:
        last = f"/{trainer.max_epochs - 1}" if trainer.max_epochs is not None and trainer.max_epochs > 0 else ""
        self._begin(f"Epoch {trainer.current_epoch}{last}", trainer.num_training_batches, first)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._advance(trainer, pl_module, batch_idx + 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._main is None:
            return
        self._draw(self._clock(), self.get_metrics(trainer, pl_module))  # the epoch's own values too
        if self.leave:
            self._end(keep=True)
        else:
            self._main = None  # the next epoch is drawn in its place

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end(keep=True)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def on_sanity_check_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end(keep=False)

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.sanity_checking:
            self._begin("Sanity check", sum(trainer.num_sanity_val_batches))
        elif trainer.state.fn == "validate":
            self._begin("Validation", sum(trainer.num_val_batches))
        else:
            if self._main is None:  # a run goes on where a validation is due
                self._begin_epoch(trainer, trainer.fit_loop.batch_idx + 1)
            self._nested = Progress("  Validation", sum(trainer.num_val_batches), self._clock())

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._begin("Testing", sum(trainer.num_test_batches))

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._begin("Predicting", sum(trainer.num_predict_batches))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._advance_evaluation(trainer, pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._advance_evaluation(trainer, pl_module)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._advance_evaluation(trainer, pl_module)

    def _advance_evaluation(self, trainer: Trainer, pl_module: Module) -> None:
        if (line := self._nested or self._main) is not None:
            self._advance(trainer, pl_module, line.done + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._nested is not None and self._main is not None:
            now = self._clock()
            self._main.paused += now - self._nested.begun
            self._nested = None
            self._draw(now, self.get_metrics(trainer, pl_module))
        elif trainer.state.fn == "validate":
            self._end(keep=True)

    def on_test_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end(keep=True)

    def on_predict_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end(keep=True)

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        self._end(keep=True)

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._end(keep=True)


class TQDMProgressBar(RichProgressBar):
    """The same bar under the name, and with the arguments, that Lightning users know.

    Args:
        refresh_rate: batches between two redraws at least; 0 shows nothing.
        process_position: accepted and without effect; only rank 0 draws.
        leave: keep the line of a finished epoch.
    """

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        super().__init__(refresh_rate, leave)


def _somebody_looks() -> bool:
    if os.environ.get("CI"):
        return False
    return sys.stdout.isatty() or Console().is_jupyter
