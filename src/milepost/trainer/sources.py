"""From a module's, data module's or caller's loaders to the streams that the loops iterate."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from milepost.data.division import Division, division_of
from milepost.data.stream import BatchStream, CombinedLoader
from milepost.errors import MisconfigurationException
from milepost.trainer.module import Module, is_overridden

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer


def requested_loaders(trainer: Trainer, name: str) -> Any:
    """The loaders for `name` (``train``, ``val``, ``test``, ``predict``): the run's, the data module's or the module's.

    Returns None where nobody defines them.
    """
    given = trainer.loaders.get(name)
    if given is not None:
        return given
    for source in (trainer.datamodule, trainer.lightning_module):
        if source is not None and is_overridden(f"{name}_dataloader", source, _base_of(source)):
            with trainer.in_hook(f"{name}_dataloader"), trainer.profile(f"{name}_dataloader", source):
                return getattr(source, f"{name}_dataloader")()
    return None


def _base_of(source: object) -> type:
    from milepost.trainer.datamodule import DataModule

    return Module if isinstance(source, Module) else DataModule


def training_loaders(trainer: Trainer) -> Any:
    """The loaders to train on, or None where the limit allows no batches.

    Raises:
        MisconfigurationException: nobody defines them.
    """
    if trainer.limit_train_batches == 0:
        return None
    loaders = requested_loaders(trainer, "train")
    if loaders is None:
        raise MisconfigurationException(
            f"`Trainer.fit` needs training data: define `train_dataloader` on {type(trainer.lightning_module).__name__}"
            " or on a DataModule, or call trainer.fit(model, train_dataloaders=...)."
        )
    return loaders


def training_stream(trainer: Trainer, loaders: Any) -> BatchStream | None:
    """The stream of training batches, or None where there is nothing to train on.

    Raises:
        MisconfigurationException: a CombinedLoader reads one loader after the other, which is for evaluation.
    """
    if loaders is None:
        return None
    if isinstance(loaders, CombinedLoader) and loaders.mode == "sequential":
        raise MisconfigurationException(
            "CombinedLoader(mode='sequential') is for validate, test and predict. To train, use 'min_size', 'max_size'"
            " or 'max_size_cycle'."
        )
    return _stream(trainer, "train", loaders, trainer.limit_train_batches, mode="max_size_cycle")


def evaluation_stream(trainer: Trainer, name: str, limit: int | float | None) -> BatchStream | None:
    """The stream of a validate, test or predict loop, one loader after the other; None where there is no loader."""
    if limit == 0:
        return None
    loaders = requested_loaders(trainer, name)
    if loaders is None:
        return None
    return _stream(trainer, name, loaders, limit, mode="sequential")


def _stream(trainer: Trainer, name: str, loaders: Any, limit: int | float | None, *, mode: str) -> BatchStream:
    if name in ("train", "val") and trainer.overfit_batches:
        loaders, limit = _without_shuffle(loaders), trainer.overfit_batches
    return BatchStream(
        loaders,
        mode=mode,
        limits=_limit(limit),
        seed=trainer.data_seed,
        rank=trainer.strategy.data_rank,
        divide=_divide(trainer, name),
        name=f"{name}_dataloader",
    )


def _divide(trainer: Trainer, name: str) -> Callable[[Any], Division | None]:
    """How loaders are divided among ranks, with the seed that Lightning takes too: that of `seed_everything`."""
    ranks = trainer.strategy.data_ranks
    if ranks == 1 or not trainer.use_distributed_sampler:
        return lambda item: None
    rank, seed = trainer.strategy.data_rank, int(os.environ.get("PL_GLOBAL_SEED", 0))
    return lambda item: division_of(item, rank, ranks, seed=seed, keep=name == "predict")


def _limit(limit: int | float | None) -> int | float | None:
    return None if limit is None or (isinstance(limit, float) and limit == 1.0) else limit


def _without_shuffle(loaders: Any) -> Any:
    """`overfit_batches` sees the same batches every epoch: torch's random sampler is replaced by the sequential one."""
    if isinstance(loaders, (list, tuple)):
        return [_without_shuffle(loader) for loader in loaders]
    if isinstance(loaders, dict):
        return {key: _without_shuffle(loader) for key, loader in loaders.items()}
    if not isinstance(loaders, DataLoader) or not isinstance(loaders.sampler, RandomSampler):
        return loaders
    return DataLoader(
        loaders.dataset,
        batch_size=loaders.batch_size,
        sampler=SequentialSampler(loaders.dataset),  # type: ignore[arg-type]
        num_workers=loaders.num_workers,
        collate_fn=loaders.collate_fn,
        pin_memory=loaders.pin_memory,
        drop_last=loaders.drop_last,
        worker_init_fn=loaders.worker_init_fn,
    )


def has_loaders(trainer: Trainer, name: str) -> bool:
    """Whether anybody defines loaders for `name`, found without asking for them."""
    return trainer.loaders.get(name) is not None or any(
        source is not None and is_overridden(f"{name}_dataloader", source, _base_of(source))
        for source in (trainer.datamodule, trainer.lightning_module)
    )
