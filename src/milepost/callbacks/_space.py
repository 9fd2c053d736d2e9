"""Before the first step: can checkpoints be written where they are meant to go, and is there room for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from milepost.callbacks._saver import Saver
from milepost.errors import CheckpointSaveError
from milepost.plugins.io import checkpoint_io as capabilities


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of one checkpoint: what it holds for certain, and with the state that optimizers are yet to make."""

    certain: int
    expected: int


def preflight(trainer: Any, saver: Saver, *, with_last: bool) -> None:
    """Test that the plugin can write where `saver` saves, and compare the free space with what will be kept there.

    Plugins that do not offer ``probe`` are not asked. Nothing is left behind.

    Raises:
        CheckpointSaveError: no checkpoint can be written, or not one has room; a warning where a failed save is one.
    """
    ledger, strict = saver.ledger, saver.on_error == "raise"
    dirpath, weights_only = ledger.dirpath, ledger.weights_only
    places = 1 + max(0, max(ledger.policy.k, 0) + with_last - len(ledger.committed.paths()))  # 1: the one under way
    try:
        free = capabilities.probe(trainer.strategy.checkpoint_io, dirpath)
    except OSError as error:
        _object(f"Checkpoints cannot be written to {dirpath!r}: {type(error).__name__}: {error}", dirpath, strict)
        return
    if free is None:
        return
    one = estimate(trainer, weights_only)
    figures = f"{dirpath!r} has {_size(free)} free; a checkpoint takes about {_size(one.expected)}"
    if free < one.certain:
        _object(f"There is no room for a single checkpoint: {figures}", dirpath, strict)
    elif free < one.expected * places:
        warnings.warn(
            f"{figures}, and {places} are to be kept there, one under way included. Free space, keep fewer, or set "
            "on_save_error='continue' to train on while the disk is full",
            stacklevel=3,
        )


def estimate(trainer: Any, weights_only: bool) -> Estimate:
    """How large the checkpoints of this run are: weights, buffers and, unless `weights_only`, optimizer state."""
    module = trainer.lightning_module
    weights = _bytes(module.parameters()) + _bytes(module.buffers())
    if weights_only:
        return Estimate(weights, weights)
    present = expected = 0
    for optimizer in trainer.optimizers:
        made = _bytes(value for state in optimizer.state.values() for value in state.values())
        present += made
        expected += made or sum(_moments(group) * _bytes(group["params"]) for group in optimizer.param_groups)
    return Estimate(weights + present, weights + expected)


def _moments(group: dict[str, Any]) -> int:
    """How many tensors of a parameter's size an optimizer of this kind keeps, judged by its settings."""
    if "betas" in group:
        return 3 if group.get("amsgrad") else 2
    return 1 if group.get("momentum") else 0


def _bytes(values: Iterable[Any]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _size(count: int) -> str:
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.3g} {unit}"


def _object(message: str, dirpath: str, strict: bool) -> None:
    remedy = "Free space, give another dirpath, or set on_save_error='continue' to train on without"
    if strict:
        raise CheckpointSaveError(f"{message}. {remedy}", path=dirpath)
    warnings.warn(f"{message}. Training goes on, and each save is tried", stacklevel=4)
