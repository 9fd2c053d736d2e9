"""The same small training job under Lightning and under Milepost, for tests that compare the two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import milepost
import milepost.callbacks

BATCHES = 5

LIGHTNINGS_OWN = [
    "ignore:.*does not have many workers",
    "ignore:.*is smaller than the logging interval",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:The dirpath has changed from",
    "ignore:.*isinstance.treespec, LeafSpec",
    "ignore:GPU available but not used",
    "ignore:.*pkg_resources",
]
"""What Lightning warns of here, and Milepost does not."""


def points() -> DataLoader[tuple[torch.Tensor, ...]]:
    """Batches of four in a fixed order, so that both libraries see the same ones."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(4 * BATCHES, 4, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.randn(4 * BATCHES, 1, generator=generator)), batch_size=4)


def fit(
    side: Any,
    folder: Path,
    net: Callable[[Any], Any],
    callbacks: list[Any],
    epochs: int,
    resume: Path | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Train ``net(side)`` with `side`'s Trainer, a file for each step kept in `folder`; returns trainer and module."""
    torch.manual_seed(0)
    saves = side.callbacks.ModelCheckpoint(
        folder, filename="{step}", auto_insert_metric_name=False, every_n_train_steps=1, save_top_k=-1
    )
    settings: dict[str, Any] = {"logger": False, "accelerator": "cpu", "default_root_dir": folder, **options}
    trainer = side.Trainer(
        max_epochs=epochs, callbacks=[*callbacks, saves], enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, **settings,
    )  # fmt: skip
    module = net(side)
    loading = {} if side is milepost else {"weights_only": False}
    trainer.fit(module, points(), ckpt_path=None if resume is None else str(resume), **loading)
    return trainer, module


def assert_equal_state(a: Any, b: Any) -> None:
    """Both modules hold the same tensors, bit for bit."""
    one, other = a.state_dict(), b.state_dict()
    assert set(one) == set(other)
    for key, value in one.items():
        assert torch.equal(value, other[key]), f"{key}: {value} against {other[key]}"
