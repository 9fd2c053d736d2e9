"""Saves the state of a run that an exception ended."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milepost.callbacks.checkpoint import Checkpoint
from milepost.errors import MisconfigurationException
from milepost.plugins.io import checkpoint_io as capabilities

if TYPE_CHECKING:
    from milepost.trainer.module import Module
    from milepost.trainer.trainer import Trainer


class OnExceptionCheckpoint(Checkpoint):
    """Saves ``dirpath/filename.ckpt`` when fit is interrupted by an exception, Ctrl-C and signals included.

    The file stays until a later fit, having saved a newer checkpoint, ends well; validate, test and predict leave it
    alone. An error of the save is a warning: the exception that ended the run is what the caller sees.

    Args:
        dirpath: directory of the file.
        filename: its name without ending.
    """

    FILE_EXTENSION = ".ckpt"

    def __init__(self, dirpath: str | os.PathLike[str], filename: str = "on_exception") -> None:
        super().__init__()
        if not filename:
            raise MisconfigurationException("filename is empty: give the crash file a name, such as 'on_exception'")
        self.dirpath = os.fspath(dirpath)
        self.filename = filename
        self._inherited = False  # the file was there when this fit began

    @property
    def ckpt_path(self) -> str:
        """Where the crash file is or will be."""
        return str(Path(self.dirpath, self.filename + self.FILE_EXTENSION))

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Note whether an earlier fit left a crash file."""
        self._inherited = bool(self._exists(trainer))

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        """Save, and wait until the file is whole."""
        if trainer.fast_dev_run or trainer.state.fn != "fit":
            return
        try:
            if "://" not in self.dirpath:
                Path(self.dirpath).mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(self.ckpt_path).result()
            self._inherited = False
        except Exception as error:
            warnings.warn(
                f"no checkpoint could be saved at {self.ckpt_path} after {type(exception).__name__}: {error}",
                stacklevel=2,
            )

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Delete the crash file of an earlier fit if this one saved something newer."""
        if self._inherited and trainer.is_global_zero and self._superseded(trainer):
            trainer.strategy.remove_checkpoint(self.ckpt_path)
            self._inherited = False

    def _superseded(self, trainer: Trainer) -> bool:
        if not Path(self.ckpt_path).exists():
            return False
        crashed = Path(self.ckpt_path).stat().st_mtime_ns
        return any(saved.exists() and saved.stat().st_mtime_ns > crashed for saved in _saved(trainer))

    def _exists(self, trainer: Trainer) -> bool:
        found = capabilities.exists(trainer.strategy.checkpoint_io, self.ckpt_path)
        return Path(self.ckpt_path).exists() if found is None else found


def _saved(trainer: Any) -> list[Path]:
    names = ("last_model_path", "best_model_path")
    paths = (getattr(callback, name, "") for callback in trainer.checkpoint_callbacks for name in names)
    return [Path(path) for path in paths if path]
