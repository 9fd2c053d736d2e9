"""What cannot be stored as data is found before the first step, whoever puts it into the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from milepost import LightningDataModule, LightningModule, Trainer
from milepost.callbacks import Callback, ModelCheckpoint
from milepost.errors import UnencodableValueError, UnsafeCheckpointError
from milepost.plugins import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO


class Custom:
    """Something that is no data."""


class Line(LightningModule):
    def __init__(self, extra: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(4, 1)
        self.batches = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.batches += 1
        loss: torch.Tensor = self.net(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class HookAdds(Line):
    late = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.batches > 0 or not self.late:
            checkpoint["mine"] = {"deep": [Custom()]}


class CallbackState(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"thing": Custom()}


class CallbackHook(Callback):
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["from_callback"] = Custom()


def loader() -> Any:
    return DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=4)


class DataState(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def state_dict(self) -> dict[str, Any]:
        return {"position": Custom()}


def fit(place: Path, model: Line, *callbacks: Any, data: Any = None, saver: Any = None, **options: Any) -> Trainer:
    saver = ModelCheckpoint(place) if saver is None else saver
    trainer = Trainer(
        **{"max_epochs": 1, **options}, accelerator="cpu", logger=False,
        callbacks=[*callbacks, *([saver] if saver else [])],
        enable_checkpointing=bool(saver), enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data or loader())
    return trainer


CASES: dict[str, tuple[str, Callable[[], tuple[Line, list[Any], Any]]]] = {
    "hyper-parameter": ("hyper_parameters.extra.0", lambda: (Line([Custom()]), [], None)),
    "module hook": ("mine.deep.0", lambda: (HookAdds(), [], None)),
    "callback state": ("callbacks.CallbackState.thing", lambda: (Line(), [CallbackState()], None)),
    "callback hook": ("from_callback", lambda: (Line(), [CallbackHook()], None)),
    "data module": ("DataState.position", lambda: (Line(), [], DataState())),
}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_it_is_found_before_the_first_step(tmp_path: Path, case: str, asynchronous: bool) -> None:
    key_path, make = CASES[case]
    model, callbacks, data = make()
    options = {"plugins": AsyncCheckpointIO()} if asynchronous else {}
    with pytest.raises(UnencodableValueError) as caught:
        fit(tmp_path, model, *callbacks, data=data, **options)
    assert caught.value.key_path == key_path
    leave_out = "save_hyperparameters(ignore=[...])" if case == "hyper-parameter" else "what the hook or state_dict"
    for part in (repr(key_path), "test_preflight.Custom", leave_out, "allow_pickle=True"):
        assert part in str(caught.value)
    assert model.batches == 0 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_pickling_by_name_trains_and_the_file_loads_only_unsafely(tmp_path: Path, asynchronous: bool) -> None:
    io: Any = TorchCheckpointIO(allow_pickle=True)
    model = Line(extra=Custom())
    trainer = fit(tmp_path, model, plugins=AsyncCheckpointIO(io) if asynchronous else io)  # a warning would be an error
    assert model.batches == 2
    path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    with pytest.raises(UnsafeCheckpointError, match=r"hyper_parameters\.extra"):
        TorchCheckpointIO(allow_pickle=True).load_checkpoint(path)
    assert isinstance(
        TorchCheckpointIO().load_checkpoint(path, weights_only=False)["hyper_parameters"]["extra"], Custom
    )


def test_a_value_that_turns_up_later_is_saved_loudly_and_training_goes_on(tmp_path: Path) -> None:
    model = HookAdds()
    model.late = True
    with pytest.warns(UserWarning, match=r"'mine\.deep\.0'.*weights_only=False"):
        trainer = fit(tmp_path, model, max_epochs=2)
    assert model.batches == 4 and len(list(tmp_path.glob("*.ckpt"))) == 1
    loaded = TorchCheckpointIO().load_checkpoint(trainer.checkpoint_callback.best_model_path, weights_only=False)  # type: ignore[union-attr]
    assert isinstance(loaded["mine"]["deep"][0], Custom)


def test_where_nothing_is_saved_nothing_is_asked(tmp_path: Path) -> None:
    model = HookAdds()
    fit(tmp_path, model, saver=False)
    fit(tmp_path, model, fast_dev_run=2)
    assert model.batches == 4


def test_only_what_would_be_saved_is_looked_at(tmp_path: Path) -> None:
    model = Line()
    fit(tmp_path, model, CallbackState(), saver=ModelCheckpoint(tmp_path, save_weights_only=True))
    assert model.batches == 2


class ThreeMethods(CheckpointIO):
    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        torch.save(checkpoint, path)

    def load_checkpoint(self, path: Any, storage_options: Any = None) -> Any:  # type: ignore[override]
        return torch.load(path, weights_only=False)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink()


class CountsSaves(Line):
    saves = 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saves += 1
        checkpoint["drawn"] = float(torch.rand(()))


def test_a_plugin_without_the_capability_is_not_asked_and_no_hook_runs_for_it(tmp_path: Path) -> None:
    model = HookAdds()
    fit(tmp_path, model, plugins=ThreeMethods())
    assert model.batches == 2
    counting = CountsSaves()
    fit(tmp_path, counting, plugins=ThreeMethods(), saver=ModelCheckpoint(tmp_path, filename="b"))
    assert counting.saves == 1
    counting = CountsSaves()
    fit(tmp_path, counting, saver=ModelCheckpoint(tmp_path, filename="c"))
    assert counting.saves == 2


def test_the_check_leaves_the_random_state_alone(tmp_path: Path) -> None:
    class Notes(CountsSaves):
        def on_train_epoch_start(self) -> None:
            self.seen = torch.get_rng_state()

    seen = []
    for saver in (None, False):
        torch.manual_seed(3)
        model = Notes()
        fit(tmp_path, model, saver=saver)
        seen.append(model.seen)
    assert torch.equal(*seen)


def test_a_hook_that_needs_a_step_first_is_told_of_and_the_run_goes_on(tmp_path: Path) -> None:
    class NeedsABatch(Line):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.last_batch = batch_idx

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["last"] = self.last_batch

    model = NeedsABatch()
    with pytest.warns(UserWarning, match="could not be checked before the first step.*AttributeError.*last_batch"):
        fit(tmp_path, model)
    assert model.batches == 2 and len(list(tmp_path.glob("*.ckpt"))) == 1
