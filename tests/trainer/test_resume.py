"""The meanings of ckpt_path, on real files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from milepost import Module, Trainer
from milepost.callbacks import ModelCheckpoint
from milepost.errors import CheckpointNotFoundError, MisconfigurationException
from milepost.trainer.resume import resolve_ckpt_path


class Tiny(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def _fit(root: Path, *callbacks: Any, epochs: int = 3) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", logger=False, max_epochs=epochs, default_root_dir=root, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Tiny(), DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2))
    return trainer


@pytest.fixture
def run(tmp_path: Path) -> Trainer:
    """Three epochs, all kept, each file a second younger than the one before, and a last."""
    trainer = _fit(tmp_path, ModelCheckpoint(tmp_path / "c", "{epoch}", save_top_k=-1, save_last=True))
    (tmp_path / "c" / "last.ckpt").unlink()
    for second in range(3):
        os.utime(tmp_path / "c" / f"epoch={second}.ckpt", (1000 + second, 1000 + second))
    return trainer


def _resolve(trainer: Trainer, ckpt_path: Any, model_provided: bool = True) -> str | None:
    return resolve_ckpt_path(trainer, ckpt_path, model_provided=model_provided)


def _name(path: str | None) -> str:
    assert path is not None
    return Path(path).name


def test_last_is_the_newest(run: Trainer) -> None:
    assert _name(_resolve(run, "last")) == "epoch=2.ckpt"


def test_last_passes_over_torn_and_flipped_files_and_says_so(run: Trainer, tmp_path: Path) -> None:
    torn, flipped = tmp_path / "c" / "epoch=2.ckpt", tmp_path / "c" / "epoch=1.ckpt"
    torn.write_bytes(torn.read_bytes()[:700])
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(bytes(data))
    os.utime(torn, (2000, 2000))
    os.utime(flipped, (1999, 1999))
    with pytest.warns(UserWarning, match=r"damaged checkpoint .*epoch=") as warned:
        assert _name(_resolve(run, "last")) == "epoch=0.ckpt"
    assert len(warned) == 2


def test_last_without_any_warns_and_starts_fresh(run: Trainer, tmp_path: Path) -> None:
    for path in (tmp_path / "c").iterdir():
        path.unlink()
    with pytest.warns(UserWarning, match="no good checkpoint in"):
        assert _resolve(run, "last") is None


def test_auto_starts_fresh_silently_and_else_takes_the_newest(run: Trainer, tmp_path: Path) -> None:
    assert _name(_resolve(run, "auto")) == "epoch=2.ckpt"
    hpc = tmp_path / "hpc_ckpt_1.ckpt"
    hpc.write_bytes((tmp_path / "c" / "epoch=0.ckpt").read_bytes())
    assert _resolve(run, "auto") == str(hpc)
    for path in [hpc, *(tmp_path / "c").iterdir()]:
        path.unlink()
    assert _resolve(run, "auto") is None


def test_hpc_is_keyed_by_the_job(run: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = (tmp_path / "c" / "epoch=0.ckpt").read_bytes()
    for name in ("hpc_ckpt_41_1.ckpt", "hpc_ckpt_42_9.ckpt", "hpc_ckpt_42_10.ckpt"):
        (tmp_path / name).write_bytes(good)
        os.utime(tmp_path / name, (1000, 1000))
    os.utime(tmp_path / "hpc_ckpt_42_10.ckpt", (1001, 1001))
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert _name(_resolve(run, "hpc")) == "hpc_ckpt_42_10.ckpt"
    run.state.fn = "fit"
    assert _name(_resolve(run, None)) == "hpc_ckpt_42_10.ckpt"
    monkeypatch.setenv("SLURM_JOB_ID", "43")
    assert _resolve(run, None) is None
    with pytest.raises(CheckpointNotFoundError, match="auto"):
        _resolve(run, "hpc")


def test_best(run: Trainer, tmp_path: Path) -> None:
    assert _name(_resolve(run, "best")) == "epoch=2.ckpt"
    run.state.fn = "test"
    assert _resolve(run, None) is None
    with pytest.warns(UserWarning, match="taking the best"):
        assert _name(_resolve(run, None, model_provided=False)) == "epoch=2.ckpt"


def test_best_where_there_is_none(tmp_path: Path) -> None:
    bare = _fit(tmp_path, ModelCheckpoint(tmp_path / "c", every_n_epochs=0), epochs=1)
    with pytest.raises(CheckpointNotFoundError, match="has saved none"):
        _resolve(bare, "best")
    without = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(MisconfigurationException, match="needs a ModelCheckpoint"):
        _resolve(without, "best")


def test_a_path_must_be_there(run: Trainer, tmp_path: Path) -> None:
    path = tmp_path / "c" / "epoch=1.ckpt"
    assert _resolve(run, path) == str(path)
    with pytest.raises(CheckpointNotFoundError, match=r"absent\.ckpt"):
        _resolve(run, tmp_path / "absent.ckpt")
    with pytest.raises(MisconfigurationException, match="registries"):
        _resolve(run, "registry:model")


def test_none_means_fresh(run: Trainer) -> None:
    run.state.fn = "fit"
    assert _resolve(run, None) is None


def test_a_path_that_was_assigned_is_what_later_runs_go_on_from(run: Trainer, tmp_path: Path) -> None:
    batches = DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(**quiet, max_epochs=4, default_root_dir=tmp_path / "on")
    assert trainer.ckpt_path is None
    trainer.ckpt_path = tmp_path / "c" / "epoch=1.ckpt"
    trainer.fit(Tiny(), batches)
    assert (trainer.restored["loops"], trainer.global_step) == ("restored", 8)
    assert trainer.ckpt_path == str(tmp_path / "c" / "epoch=1.ckpt")
    with pytest.warns(UserWarning, match="going on from the latter"):
        trainer.fit(Tiny(), batches, ckpt_path=tmp_path / "c" / "epoch=0.ckpt")
    assert trainer.ckpt_path == str(tmp_path / "c" / "epoch=0.ckpt")
    trainer.fit(Tiny(), batches)
    assert trainer.ckpt_path is None, "what was assigned counts no more once another was given"


def test_the_newest_good_one_is_taken_on_trust_and_said_so_where_the_plugin_cannot_verify(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Plain:
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            Path(path).parent.mkdir(exist_ok=True)
            torch.save(checkpoint, path)

        def load_checkpoint(self, path: Any, storage_options: Any = None) -> Any:
            return torch.load(path, weights_only=False)

        def remove_checkpoint(self, path: Any) -> None:
            Path(path).unlink()

    def fit(epochs: int, ckpt_path: str | None) -> Trainer:
        trainer = Trainer(
            accelerator="cpu", logger=False, max_epochs=epochs, plugins=Plain(), enable_progress_bar=False,
            enable_model_summary=False, callbacks=ModelCheckpoint(tmp_path / "c", save_last=True),
        )  # fmt: skip
        trainer.fit(Tiny(), DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2), ckpt_path=ckpt_path)
        return trainer

    fit(1, None)
    assert "cannot verify" not in caplog.text
    assert fit(2, "last").global_step == 4
    assert "Plain cannot verify checkpoints" in caplog.text
    assert "last.ckpt is taken to be good" in caplog.text
