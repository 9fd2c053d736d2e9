"""Progress on the terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from milepost.callbacks.callback import Callback
from milepost.errors import MisconfigurationException

if TYPE_CHECKING:
    from milepost.trainer.module import Module
    from milepost.trainer.trainer import Trainer


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
    """One line with epoch, batch, speed and metrics. Silent where the output is no terminal, and where ``CI`` is set.

    Args:
        refresh_rate: batches between two redraws; 0 shows nothing.
        leave: keep the line of a finished epoch and begin a new one below.
        console: where to draw; the standard output if None.
        clock: seconds, from any origin, by which the speed is measured.
    """

    def __init__(
        self,
        refresh_rate: int = 1,
        leave: bool = False,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        if refresh_rate < 0:
            raise MisconfigurationException(f"refresh_rate is {refresh_rate!r} batches; give 0 (silent) or more")
        self.refresh_rate = refresh_rate
        self.leave = leave
        self._console = console
        self._clock = clock
        self._live: Live | None = None
        self._stage: tuple[str, int | float] = ("", 0)
        self._begin = 0.0
        self._done = 0
        self._first_batch = 0

    @property
    def is_enabled(self) -> bool:
        return self._enabled and self.refresh_rate > 0 and (self._console is not None or _on_terminal())

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self._live is None:
            print(*args, **kwargs)
        else:
            self._live.console.print(*args)

    # ---- drawing -------------------------------------------------------------------------------------------------

    def _start(self, label: str, total: int | float, first_batch: int = 0) -> None:
        if not self.is_enabled:
            return
        self._stage, self._begin, self._first_batch = (label, total), self._clock(), first_batch
        if self._live is None:
            console = self._console or Console()
            self._live = Live("", console=console, auto_refresh=False, transient=not self.leave)
            self._live.start()

    def _draw(self, trainer: Trainer, pl_module: Module, done: int) -> None:
        label, total = self._stage
        if self._live is None or (done % self.refresh_rate and done != total):
            return
        elapsed = self._clock() - self._begin
        speed = (done - self._first_batch) / elapsed if elapsed > 0 else 0.0
        self._live.update(Text(line(label, done, total, speed, self.get_metrics(trainer, pl_module))), refresh=True)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def _start_epoch(self, trainer: Trainer, first_batch: int) -> None:
        last = f"/{trainer.max_epochs - 1}" if trainer.max_epochs is not None and trainer.max_epochs > 0 else ""
        self._start(f"Epoch {trainer.current_epoch}{last}", trainer.num_training_batches, first_batch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        if self._live is None or not self._stage[0].startswith("Epoch"):  # an epoch begins, or goes on midway
            self._start_epoch(trainer, batch_idx)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._draw(trainer, pl_module, batch_idx + 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._stop()

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        sanity = trainer.sanity_checking
        self._start_evaluation(
            "Sanity check" if sanity else "Validation",
            trainer.num_sanity_val_batches if sanity else trainer.num_val_batches,
        )

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._start_evaluation("Testing", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._start_evaluation("Predicting", trainer.num_predict_batches)

    def _start_evaluation(self, label: str, batches: list[int | float]) -> None:
        self._done = 0
        self._start(label, sum(batches))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._done += 1
        self._draw(trainer, pl_module, self._done)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._done += 1
        self._draw(trainer, pl_module, self._done)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._done += 1
        self._draw(trainer, pl_module, self._done)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._stage = ("", 0)  # the next training batch draws the epoch's line again
        if trainer.sanity_checking or not trainer.training:
            self._stop()

    def on_test_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._stop()

    def on_predict_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._stop()


class TQDMProgressBar(RichProgressBar):
    """The same bar under the name, and with the arguments, that Lightning users know.

    Args:
        refresh_rate: batches between two redraws; 0 shows nothing.
        process_position: accepted and without effect; only rank 0 draws.
        leave: keep the line of a finished epoch.
    """

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        super().__init__(refresh_rate, leave)


def line(label: str, done: int, total: int | float, speed: float, metrics: dict[str, int | str | float]) -> str:
    """The line that is drawn: ``Epoch 0/9  12/100  3.40 it/s  loss 0.123``. `speed` is in batches per second."""
    known = total not in (0, float("inf"))
    shown = [f"{name} {_spelled(value)}" for name, value in metrics.items()]
    return "  ".join([label, f"{done}/{total}" if known else str(done), f"{speed:.2f} it/s", *shown])


def _spelled(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        value = value.item()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _on_terminal() -> bool:
    return sys.stdout.isatty() and not os.environ.get("CI")
