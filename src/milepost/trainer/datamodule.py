"""Data and its preparation, apart from the model."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from milepost.core.hooks import CheckpointHooks, DataHooks
from milepost.trainer.hparams import Hyperparameters, instantiate
from milepost.trainer.state import read_checkpoint

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer


class DataModule(DataHooks, CheckpointHooks, Hyperparameters):
    """Loaders with the code that prepares them. Also exported as ``LightningDataModule``."""

    trainer: Trainer | None = None

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    def on_exception(self, exception: BaseException) -> None:
        """Called when the run is interrupted by `exception`, after the callbacks. `teardown` is not called then."""

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build the data module from the hyper-parameters and state in a checkpoint; the caller's RNG is left alone."""
        checkpoint = read_checkpoint(checkpoint_path, map_location, weights_only)
        data = instantiate(
            cls,
            checkpoint.get("datamodule_hyper_parameters", {}),
            kwargs,
            name=checkpoint.get("datamodule_hparams_name") or "kwargs",
        )
        state = checkpoint.get(cls.__qualname__)
        if state:
            data.load_state_dict(state)
        return data


LightningDataModule = DataModule
