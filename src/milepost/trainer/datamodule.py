"""Data and its preparation, apart from the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from milepost.core.hooks import CheckpointHooks, DataHooks
from milepost.data.rng import isolated_rng
from milepost.trainer.hparams import Hyperparameters
from milepost.trainer.rebuild import instantiate, on_the_class_only, read_hparams
from milepost.trainer.state import read_checkpoint

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer


Datasets = Dataset[Any] | Iterable[Dataset[Any]] | Mapping[str, Dataset[Any]] | None


class DataModule(DataHooks, CheckpointHooks, Hyperparameters):
    """Loaders with the code that prepares them. Also exported as ``LightningDataModule``."""

    trainer: Trainer | None = None
    name: str | None = None
    """For the user's own use."""

    CHECKPOINT_HYPER_PARAMS_KEY = "datamodule_hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "datamodule_hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "datamodule_hparams_type"

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Datasets = None,
        val_dataset: Datasets = None,
        test_dataset: Datasets = None,
        predict_dataset: Datasets = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **datamodule_kwargs: Any,
    ) -> Self:
        """Build a data module of datasets, or of nested lists or dicts of them, one loader for each.

        Args:
            batch_size: samples in a batch of every loader.
            num_workers: processes that load, for every loader; 0 loads in this one.
            datamodule_kwargs: arguments of the constructor, which also gets `batch_size` and `num_workers` if it takes
                them.
        """
        options = {"batch_size": batch_size, "num_workers": num_workers}
        taken = inspect.signature(cls).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        data = cls(**datamodule_kwargs, **{k: v for k, v in options.items() if takes_any or k in taken})
        given = {"train": train_dataset, "val": val_dataset, "test": test_dataset, "predict": predict_dataset}
        for name, datasets in given.items():
            if datasets is not None:
                setattr(data, f"{name}_dataloader", partial(_loaders, datasets, name == "train", options))
        return data

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    def on_exception(self, exception: BaseException) -> None:
        """Called when the run is interrupted by `exception`, after the callbacks. `teardown` is not called then."""

    @on_the_class_only
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build the data module from the hyper-parameters and state in a checkpoint; the caller's RNG is left alone.

        The arguments and errors are those of `Module.load_from_checkpoint`.
        """
        checkpoint = read_checkpoint(checkpoint_path, map_location, weights_only)
        if hparams_file is not None:
            checkpoint["datamodule_hyper_parameters"] = read_hparams(hparams_file)
        with isolated_rng():
            data = instantiate(cls, checkpoint, kwargs, prefix="datamodule_")
            if state := checkpoint.get(cls.__qualname__):
                data.load_state_dict(state)
        return data


def _loaders(datasets: Any, shuffle: bool, options: dict[str, int]) -> Any:
    if isinstance(datasets, Mapping):
        return {name: _loaders(part, shuffle, options) for name, part in datasets.items()}
    if isinstance(datasets, list | tuple):
        return [_loaders(part, shuffle, options) for part in datasets]
    shuffled = shuffle and not isinstance(datasets, IterableDataset)
    return DataLoader(datasets, shuffle=shuffled, pin_memory=torch.cuda.is_available(), **options)  # type: ignore[arg-type]


LightningDataModule = DataModule
