"""The page on what against how: its two examples run as printed, together and without knowing of each other."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from milepost import Checkpointer, LightningDataModule, LightningModule, Trainer
from milepost.callbacks import Callback, KeepBest, KeepNewest, ModelCheckpoint
from milepost.plugins import CheckpointIO

PAGE = Path(__file__).parents[2] / "docs/checkpointing.md"


def example(name: str) -> dict[str, Any]:
    found = re.search(rf"```python {name}\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {
        "Callback": Callback,
        "LightningDataModule": LightningDataModule,
        "LightningModule": LightningModule,
        "CheckpointIO": CheckpointIO,
        "Path": Path,
        "gzip": gzip,
        "torch": torch,
    }
    exec(found.group(1), names)
    return names


class Counting(example("what")["CountsTokens"]):  # type: ignore[misc]
    """The page's module with a model to train; each batch counts as 10 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.tokens += 10
        loss: torch.Tensor = self.net(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(directory: Path, epochs: int, plugins: Any, ckpt_path: str | None = None) -> Counting:
    model = Counting()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        plugins=plugins,
        callbacks=[ModelCheckpoint(dirpath=directory, save_last=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(torch.ones(6, 2)), batch_size=2), ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize("gzipped", [False, True])
def test_own_entry_comes_back_whatever_writes_the_file(gzipped: bool, tmp_path: Path) -> None:
    plugins = [example("how")["GzipCheckpointIO"]()] if gzipped else None
    fit(tmp_path, 1, plugins)
    last = tmp_path / "last.ckpt"
    assert last.read_bytes().startswith(b"\x1f\x8b") is gzipped
    resumed = fit(tmp_path, 2, plugins, ckpt_path=str(last))
    assert resumed.tokens == 60


@pytest.mark.filterwarnings("ignore:strict=False")
def test_a_data_module_and_a_callback_change_what_is_saved(tmp_path: Path) -> None:
    names = example("others")

    class Corpus(names["Corpus"]):  # type: ignore[misc, name-defined]
        def train_dataloader(self) -> Any:
            self.shard += 3
            return DataLoader(TensorDataset(torch.ones(6, 2)), batch_size=2)

    def run(epochs: int) -> tuple[Any, Any]:
        model, data, callback = Counting(), Corpus(), names["DropsFrozen"]()
        model.strict_loading = False
        model.net.bias.requires_grad_(False)
        trainer = Trainer(
            accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[callback, ModelCheckpoint(dirpath=tmp_path, save_last=True)],
        )  # fmt: skip
        trainer.fit(model, data, ckpt_path="auto")
        return data, callback

    run(1)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert (saved["shard"], list(saved["state_dict"])) == (3, ["net.weight"])
    data, callback = run(2)
    assert (data.shard, callback.lacked) == (6, 1)


def test_plugin_removes_what_is_no_longer_kept(tmp_path: Path) -> None:
    fit(tmp_path, 3, [example("how")["GzipCheckpointIO"]()])
    assert len(list(tmp_path.glob("epoch=*.ckpt"))) == 1


def test_the_plain_loop_keeps_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())

    def train(step: int) -> float:
        loss = model(torch.ones(2)).square().sum()
        loss.backward()
        optimizer.step()
        return 1.0 / step if step != 50 else 0.0

    found = re.search(r"```python loop\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert found is not None
    names = {
        "Checkpointer": Checkpointer, "KeepNewest": KeepNewest, "KeepBest": KeepBest, "model": model,
        "optimizer": optimizer, "train": train,
    }  # fmt: skip
    exec(found.group(1), names)
    assert Checkpointer("runs/1").steps() == [50, 80, 90, 100]


def test_a_part_is_restored_as_the_page_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, model = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": saved}, wait=True)
        found = re.search(r"```python part\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
        assert found is not None
        exec(found.group(1), {"checkpointer": checkpointer, "state": {"model": model, "epoch": 3}})
    assert torch.equal(model.weight, saved.weight)
    assert "'epoch': 'not in the checkpoint'" in capsys.readouterr().out
