"""Points of the contract that Lightning breaks and that no other test holds: docs/contract.md lists all of them.

The tests use only what both libraries have, so that the same file shows the defects:
``CONTRACT_ON=pytorch_lightning pytest tests/contract/test_broken_upstream.py`` fails where ours passes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

LIBRARY = os.environ.get("CONTRACT_ON", "milepost")
lib = importlib.import_module(LIBRARY)
callbacks = importlib.import_module(f"{LIBRARY}.callbacks")
plugins = importlib.import_module(f"{LIBRARY}.plugins.io")

pytestmark = [] if LIBRARY == "milepost" else [pytest.mark.filterwarnings("ignore")]


class Numbered(Dataset[Any]):
    """Sixteen samples that carry their own number."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, torch.full((2,), index / 16)


class Model(lib.LightningModule):  # type: ignore[name-defined, misc]
    """Notes which samples it saw; does `at[n]` in the training step that begins after `n` optimizer steps."""

    def __init__(self, at: dict[int, Any] | None = None, **hparams: Any) -> None:
        super().__init__()
        self.save_hyperparameters(hparams)
        self.layer = torch.nn.Linear(2, 1)
        self.at = at or {}
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if action := self.at.get(self.trainer.global_step):
            action()
        self.seen += batch[0].tolist()
        return self.layer(batch[1]).pow(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss/val", self.layer(batch[1]).pow(2).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Momentum(Model):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Stop(Exception):
    """Ends a run."""


def stop() -> None:
    raise Stop


def fit(
    root: Path, *given: Any, model: Any = None, ckpt_path: Any = None, validate: bool = False, **options: Any
) -> Any:
    """Eight steps an epoch. Returns the trainer."""
    trainer = lib.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=root, callbacks=list(given), num_sanity_val_steps=0, **{"max_epochs": 1, **options},
    )  # fmt: skip
    data = DataLoader(Numbered(), batch_size=2, shuffle=True)
    trainer.fit(model or Model(), data, DataLoader(Numbered(), batch_size=8) if validate else None, ckpt_path=ckpt_path)
    return trainer


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()} - {"index.json"}


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions do not bind root: be nobody for the while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_01_a_directory_that_may_not_be_written_to_is_an_error(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        fit(tmp_path, callbacks.ModelCheckpoint(tmp_path / "c"))  # imports what nobody may not read
        Path(name).chmod(0o555)
        with unprivileged(), pytest.raises(OSError, match="denied"):
            fit(tmp_path, callbacks.ModelCheckpoint(name))
        assert names(Path(name)) == set()


def test_03_a_flipped_weight_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    plugins.TorchCheckpointIO().save_checkpoint({"state_dict": {"w": torch.zeros(100_000)}}, str(path))
    with path.open("r+b") as file:
        file.seek(200_000)
        file.write(b"\xff")
    with pytest.raises(ValueError, match=r"damaged.*state_dict\.w"):
        plugins.TorchCheckpointIO().load_checkpoint(str(path))


def test_04_the_last_passes_over_a_torn_file(tmp_path: Path) -> None:
    def checkpointer() -> Any:
        return callbacks.ModelCheckpoint(tmp_path / "c", "{step}", every_n_train_steps=3, save_top_k=-1, save_last=True)

    fit(tmp_path, checkpointer())
    os.truncate(tmp_path / "c" / "last.ckpt", 900)
    os.utime(tmp_path / "c" / "step=3.ckpt", (1, 1))
    model = Model()
    with pytest.warns(UserWarning, match=r"damaged checkpoint .*last\.ckpt"):
        fit(tmp_path, checkpointer(), model=model, ckpt_path="last")
    assert len(model.seen) == 4, "on from step 6"


def test_05_a_run_of_one_epoch_with_a_validated_monitor_leaves_a_true_file(tmp_path: Path) -> None:
    checkpointer = callbacks.ModelCheckpoint(tmp_path / "c", monitor="loss/val", every_n_train_steps=2)
    trainer = fit(tmp_path, checkpointer, validate=True)
    assert len(list((tmp_path / "c").glob("*step=8.ckpt"))) == 1
    assert float(checkpointer.best_model_score) == float(trainer.callback_metrics["loss/val"])


def test_06_a_misspelt_monitor_still_leaves_a_file(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="lost/val"):
        fit(tmp_path, callbacks.ModelCheckpoint(tmp_path / "c", monitor="lost/val"), validate=True)
    assert len(list((tmp_path / "c").glob("*.ckpt"))) == 1


def test_07_saving_in_the_background_leaves_the_kept_files_only(tmp_path: Path) -> None:
    checkpointer = callbacks.ModelCheckpoint(tmp_path / "c", every_n_train_steps=1)
    io = plugins.AsyncCheckpointIO(plugins.TorchCheckpointIO())
    trainer = fit(tmp_path, checkpointer, plugins=[io], max_epochs=2)
    assert len(list((tmp_path / "c").glob("*.ckpt"))) == 1
    trainer.save_checkpoint(tmp_path / "more.ckpt")
    assert io.load_checkpoint(str(tmp_path / "more.ckpt"))["global_step"] == 16, "a load sees the save before it"
    io.teardown()


def test_09_an_error_in_the_background_tells_path_and_step_and_does_not_come_back(tmp_path: Path) -> None:
    io = plugins.AsyncCheckpointIO(plugins.TorchCheckpointIO())
    with pytest.raises(OSError, match=r"step 8 .*c/x+\.ckpt"):
        fit(tmp_path, callbacks.ModelCheckpoint(tmp_path / "c", "x" * 300), plugins=[io])
    fit(tmp_path, callbacks.ModelCheckpoint(tmp_path / "c"), plugins=[io])
    assert len(list((tmp_path / "c").glob("*.ckpt"))) == 1


def test_08_tied_weights_are_written_once(tmp_path: Path) -> None:
    weight = torch.randn(100_000)
    io = plugins.AsyncCheckpointIO(plugins.TorchCheckpointIO())
    io.save_checkpoint({"global_step": 1, "state_dict": {"a": weight, "b": weight}}, str(tmp_path / "a.ckpt"))
    io.teardown()
    assert (tmp_path / "a.ckpt").stat().st_size < 1.2 * weight.nbytes


def test_12_no_sample_is_seen_twice_after_a_resume_inside_an_epoch(tmp_path: Path) -> None:
    torch.manual_seed(3)
    checkpointer = callbacks.ModelCheckpoint(tmp_path / "c", every_n_train_steps=1)
    first, second = Model({5: stop}), Model()
    with pytest.raises(Stop):
        fit(tmp_path, checkpointer, model=first)
    torch.manual_seed(4)
    fit(tmp_path, checkpointer, model=second, ckpt_path=checkpointer.best_model_path)
    assert sorted(first.seen + second.seen) == list(range(16))


def test_13_the_last_is_the_newest_and_no_second_write(tmp_path: Path) -> None:
    checkpointer = callbacks.ModelCheckpoint(tmp_path / "c", "best", monitor="step", mode="min", save_last=True)
    fit(tmp_path, checkpointer, max_epochs=2)
    io = plugins.TorchCheckpointIO()
    assert io.load_checkpoint(checkpointer.best_model_path)["global_step"] == 8
    assert io.load_checkpoint(checkpointer.last_model_path)["global_step"] == 16
    both = callbacks.ModelCheckpoint(tmp_path / "d", save_last=True)
    fit(tmp_path, both)
    assert Path(both.best_model_path).samefile(both.last_model_path)


def test_14_a_run_resumes_from_its_own_hyper_parameters(tmp_path: Path) -> None:
    given = {"data": Path("/data/x"), "rate": np.float64(0.1), "limits": {"steps": np.int32(3)}}
    checkpointer = callbacks.ModelCheckpoint(tmp_path / "c")
    fit(tmp_path, checkpointer, model=Model(**given))
    resumed = fit(tmp_path, model=Model(**given), ckpt_path=checkpointer.best_model_path, max_epochs=2)
    assert resumed.global_step == 16
    loaded = Model.load_from_checkpoint(checkpointer.best_model_path)
    assert dict(loaded.hparams) == given and type(loaded.hparams["rate"]) is np.float64


@pytest.mark.skipif(LIBRARY != "milepost", reason="SIGUSR1 outside SLURM kills a process that runs Lightning")
def test_17_a_signal_in_the_middle_of_a_step_is_acted_on_after_it(tmp_path: Path) -> None:
    after: list[int] = []

    class Note(callbacks.Callback):  # type: ignore[name-defined, misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            after.append(trainer.global_step)

    model = Model({3: lambda: os.kill(os.getpid(), signal.SIGUSR1)})
    with pytest.raises(SystemExit):
        fit(tmp_path, Note(), callbacks.ModelCheckpoint(tmp_path / "c", every_n_epochs=0), model=model)
    assert after == [1, 2, 3, 4], "the step was finished, none was begun"
    (requeue,) = tmp_path.rglob("hpc_ckpt_*.ckpt")
    resumed = Model()
    never = callbacks.ModelCheckpoint(tmp_path / "c", every_n_epochs=0)
    fit(tmp_path, never, model=resumed, ckpt_path=str(requeue))
    assert sorted(model.seen + resumed.seen) == list(range(16))


def test_17_asking_for_a_requeue_file_where_there_is_none_starts_fresh(tmp_path: Path) -> None:
    assert fit(tmp_path, ckpt_path="auto").global_step == 8


def test_18_the_crash_file_outlives_a_validation(tmp_path: Path) -> None:
    crash = callbacks.OnExceptionCheckpoint(tmp_path / "crash")
    with pytest.raises(Stop):
        fit(tmp_path, crash, model=Model({3: stop}))
    other = lib.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path, callbacks=[crash]
    )
    other.validate(Model(), DataLoader(Numbered()), verbose=False)
    assert names(tmp_path / "crash") == {"on_exception.ckpt"}


def test_19_a_resumed_run_keeps_what_it_now_asks_for_and_forgets_what_is_gone(tmp_path: Path) -> None:
    def checkpointer(k: int) -> Any:
        return callbacks.ModelCheckpoint(tmp_path / "c", "{step}", monitor="step", mode="min", save_top_k=k)

    fit(tmp_path, checkpointer(3), max_epochs=3)
    (tmp_path / "c" / "step=8.ckpt").unlink()
    resumed = checkpointer(1)
    fit(tmp_path, resumed, ckpt_path=str(tmp_path / "c" / "step=24.ckpt"), max_epochs=4)
    assert {p.name for p in (tmp_path / "c").glob("*.ckpt")} == {"step=16.ckpt", "step=24.ckpt"}
    assert Path(resumed.best_model_path).name == "step=16.ckpt"


def test_20_a_moved_run_keeps_its_best(tmp_path: Path) -> None:
    def checkpointer(directory: str) -> Any:
        return callbacks.ModelCheckpoint(tmp_path / directory, "{step}", monitor="step", mode="min", save_last=True)

    fit(tmp_path, checkpointer("c"))
    (tmp_path / "c").rename(tmp_path / "moved")
    resumed = checkpointer("moved")
    fit(tmp_path, resumed, ckpt_path=str(tmp_path / "moved" / "last.ckpt"), max_epochs=2)
    assert resumed.best_model_path == str(tmp_path.resolve() / "moved" / "step=8.ckpt")
    assert {p.name for p in (tmp_path / "moved").glob("*.ckpt")} == {"step=8.ckpt", "last.ckpt"}


def test_21_two_checkpointers_may_differ_in_their_file_name_only(tmp_path: Path) -> None:
    fit(tmp_path, *(callbacks.ModelCheckpoint(tmp_path / "c", name) for name in ("a", "b")))
    assert {p.name for p in (tmp_path / "c").glob("*.ckpt")} == {"a.ckpt", "b.ckpt"}


def test_23_an_optimizer_of_another_class_is_explained(tmp_path: Path) -> None:
    checkpointer = callbacks.ModelCheckpoint(tmp_path / "c")
    fit(tmp_path, checkpointer)
    with pytest.raises(RuntimeError, match=r"'momentum'.*SGD.*another class"):
        fit(tmp_path, model=Momentum(), ckpt_path=checkpointer.best_model_path, max_epochs=2)


def test_24_an_unknown_metric_in_the_filename_is_an_error_and_loses_no_state(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="typo"):
        fit(tmp_path, callbacks.ModelCheckpoint(tmp_path / "c", "{epoch}-{typo:.2f}"), validate=True)
    assert names(tmp_path / "c") == {"epoch=0-step=8.ckpt"}


def test_24_a_slash_in_a_metric_makes_no_directory(tmp_path: Path) -> None:
    fit(tmp_path, callbacks.ModelCheckpoint(tmp_path / "c", "{loss/val:.2f}", monitor="loss/val"), validate=True)
    assert [p.name for p in (tmp_path / "c").glob("*.ckpt")] == [p.name for p in (tmp_path / "c").rglob("*.ckpt")]
