"""A CheckpointIO as Lightning's page on it shows one, given in each of the ways it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from milepost import LightningDataModule, LightningModule, Trainer
from milepost.callbacks import Callback, Checkpoint, ModelCheckpoint
from milepost.errors import CheckpointFormatError, MisconfigurationException
from milepost.plugins import AsyncCheckpointIO, CheckpointIO
from milepost.plugins.io import checkpoint_io as io_calls
from milepost.strategies import SingleDeviceStrategy


class CustomCheckpointIO(CheckpointIO):
    """The page's class with bodies: `load_checkpoint` takes two arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.calls.append(("save", Path(path).name))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)

    def load_checkpoint(self, path: Any, storage_options: Any = None) -> dict[str, Any]:  # type: ignore[override]
        self.calls.append(("load", Path(path).name))
        loaded: dict[str, Any] = torch.load(path, weights_only=False)
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        self.calls.append(("remove", Path(path).name))
        Path(path).unlink()


class EmptyCheckpointIO(CheckpointIO):
    """The page's class word for word."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> Any: ...

    def load_checkpoint(self, path: Any, storage_options: Any = None) -> Any: ...

    def remove_checkpoint(self, path: Any) -> Any: ...


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(place: Path, epochs: int, ckpt_path: Path | str | None = None, **choice: Any) -> Trainer:
    trainer = Trainer(
        **{"accelerator": "cpu", **choice}, max_epochs=epochs, logger=False, callbacks=[ModelCheckpoint(place)],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Line(), DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=4), ckpt_path=ckpt_path)
    return trainer


def listed(io: Any) -> dict[str, Any]:
    return {"plugins": [io]}


def bare(io: Any) -> dict[str, Any]:
    return {"plugins": io}


def by_strategy(io: Any) -> dict[str, Any]:
    return {"strategy": SingleDeviceStrategy(torch.device("cpu"), checkpoint_io=io)}


WAYS = pytest.mark.parametrize("given", [listed, bare, by_strategy])


@WAYS
def test_a_two_argument_plugin_saves_resumes_and_removes(given: Any, tmp_path: Path) -> None:
    io = CustomCheckpointIO()
    trainer = fit(tmp_path, 2, **given(io))
    assert trainer.strategy.checkpoint_io is io
    assert io.calls == [
        ("save", "epoch=0-step=2.ckpt"), ("save", "epoch=1-step=4.ckpt"), ("remove", "epoch=0-step=2.ckpt")
    ]  # fmt: skip
    again = CustomCheckpointIO()
    resumed = fit(tmp_path, 3, tmp_path / "epoch=1-step=4.ckpt", **given(again))
    assert again.calls[0] == ("load", "epoch=1-step=4.ckpt")
    assert resumed.global_step == 6


@pytest.mark.parametrize("ckpt_path", ["last", "auto"])
@pytest.mark.parametrize(
    "wrap", [AsyncCheckpointIO, lambda io: AsyncCheckpointIO(AsyncCheckpointIO(io)), lambda io: io]
)
def test_what_a_plugin_that_lists_nothing_saved_is_found_again(wrap: Any, ckpt_path: str, tmp_path: Path) -> None:
    fit(tmp_path, 1, plugins=wrap(CustomCheckpointIO()))
    again = CustomCheckpointIO()
    fit(tmp_path, 2, ckpt_path, plugins=wrap(again))
    assert again.calls[0] == ("load", "epoch=0-step=2.ckpt"), "it began anew without a word"


def test_a_wrapper_cannot_tell_what_the_plugin_in_it_cannot() -> None:
    io = AsyncCheckpointIO(CustomCheckpointIO())
    assert io_calls.exists(io, "kept/elsewhere.ckpt") is None
    assert io_calls.list_checkpoints(io, "kept") is None


def test_what_a_plugin_does_not_take_is_not_passed_to_it(tmp_path: Path) -> None:
    given: list[Any] = []

    class Newer(CustomCheckpointIO):
        def load_checkpoint(self, path: Any, *, weights_only: Any = "default") -> Any:  # type: ignore[override]
            given.append(weights_only)
            return super().load_checkpoint(path)

    class Any_(CustomCheckpointIO):
        def load_checkpoint(self, path: Any, **options: Any) -> Any:  # type: ignore[override]
            given.append(options)
            return super().load_checkpoint(path)

    fit(tmp_path, 1, plugins=CustomCheckpointIO())
    path = tmp_path / "epoch=0-step=2.ckpt"
    for plugin in (CustomCheckpointIO, Newer, Any_):
        for asked in (None, False):
            trainer = Trainer(
                accelerator="cpu", max_epochs=1, logger=False, callbacks=[ModelCheckpoint(tmp_path)], plugins=plugin(),
                enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(Line(), DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=4), None, None, path, asked)
    assert given == ["default", False, {}, {"weights_only": False}]


def test_a_plugin_written_for_lightning_works(tmp_path: Path) -> None:
    theirs = pytest.importorskip("pytorch_lightning.plugins.io")

    class Theirs(theirs.CheckpointIO):  # type: ignore[misc, name-defined]
        save_checkpoint = CustomCheckpointIO.save_checkpoint
        load_checkpoint = CustomCheckpointIO.load_checkpoint
        remove_checkpoint = CustomCheckpointIO.remove_checkpoint

        def __init__(self) -> None:
            self.calls: list[tuple[str, str]] = []

    io = Theirs()
    fit(tmp_path, 1, plugins=[io])
    assert fit(tmp_path, 3, tmp_path / "epoch=0-step=2.ckpt", plugins=io).global_step == 6
    assert [call for call, _ in io.calls] == ["save", "load", "save", "save", "remove"]
    assert ("remove", "epoch=1-step=4.ckpt") in io.calls, "the file that training went on from stays"


def test_lightnings_own_torch_plugin_works(tmp_path: Path) -> None:
    theirs = pytest.importorskip("pytorch_lightning.plugins.io")
    fit(tmp_path, 1, plugins=[theirs.TorchCheckpointIO()])
    resumed = fit(tmp_path, 2, tmp_path / "epoch=0-step=2.ckpt", plugins=[theirs.TorchCheckpointIO()])
    assert resumed.global_step == 4


@WAYS
def test_bodies_that_do_nothing_fit_but_cannot_be_resumed_from(given: Any, tmp_path: Path) -> None:
    assert fit(tmp_path, 2, **given(EmptyCheckpointIO())).global_step == 4
    with pytest.raises(CheckpointFormatError, match=r"EmptyCheckpointIO.load_checkpoint\(.*returned NoneType"):
        fit(tmp_path, 3, tmp_path / "epoch=1-step=4.ckpt", **given(EmptyCheckpointIO()))


def test_a_strategys_plugin_and_one_more_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="both strategy class and plugins, choose one"):
        Trainer(**listed(CustomCheckpointIO()), **by_strategy(CustomCheckpointIO()))


def test_two_plugins_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="2 values for CheckpointIO"):
        Trainer(plugins=[CustomCheckpointIO(), CustomCheckpointIO()])


@pytest.mark.parametrize("wrong", ["async", 7, CustomCheckpointIO, object()])
@pytest.mark.parametrize("given", [listed, bare])
def test_what_is_no_plugin_is_refused(wrong: Any, given: Any) -> None:
    with pytest.raises(MisconfigurationException, match="invalid type for plugin"):
        Trainer(**given(wrong))


def test_a_strategy_refuses_what_is_no_plugin() -> None:
    with pytest.raises(MisconfigurationException, match="is not a CheckpointIO"):
        SingleDeviceStrategy(torch.device("cpu"), checkpoint_io=object())


def test_a_checkpointer_of_ones_own_is_the_only_one(tmp_path: Path) -> None:
    class EachEpoch(Checkpoint):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    own, other = EachEpoch(), Callback()
    trainer = Trainer(**quiet, max_epochs=2, callbacks=[own, other], default_root_dir=tmp_path)
    assert trainer.callbacks == [other, own], "it comes last, and no default one is added"
    assert trainer.checkpoint_callbacks == [trainer.checkpoint_callback] == [own]
    trainer.fit(Line(), DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.ckpt", "1.ckpt"]
    with pytest.raises(MisconfigurationException, match="EachEpoch is among the callbacks"):
        Trainer(**quiet, callbacks=own, enable_checkpointing=False)


@pytest.mark.parametrize("plugin", [None, CustomCheckpointIO], ids=["default", "two arguments"])
def test_hooks_of_module_data_and_callbacks_decide_what_any_plugin_stores(plugin: Any, tmp_path: Path) -> None:
    class Keeps:
        kept: int | None = None

    class Data(Keeps, LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=4)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["data"] = 1

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.kept = checkpoint["data"]

    class Model(Keeps, Line):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["model"] = 2
            del checkpoint["optimizer_states"][0]["param_groups"][0]["dampening"]  # what is there may be changed too

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.kept = checkpoint["model"]
            group = checkpoint["optimizer_states"][0]["param_groups"][0]
            assert "dampening" not in group
            group["dampening"] = 0

    class Watcher(Keeps, Callback):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["watcher"] = 3

        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            self.kept = checkpoint["watcher"]

    def run(epochs: int, ckpt_path: str | None = None) -> list[int | None]:
        model, data, watcher = Model(), Data(), Watcher()
        trainer = Trainer(
            accelerator="cpu", logger=False, max_epochs=epochs, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[watcher, ModelCheckpoint(tmp_path, save_last=True)], plugins=plugin and plugin(),
        )  # fmt: skip
        trainer.fit(model, data, ckpt_path=ckpt_path)
        return [data.kept, model.kept, watcher.kept]

    assert run(1) == [None, None, None]
    assert run(2, "last") == [1, 2, 3]
