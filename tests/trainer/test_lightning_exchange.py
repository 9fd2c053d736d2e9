"""Callbacks, positions inside an epoch, and hyper-parameters, in files that Lightning wrote or that it reads."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import milepost
import milepost.callbacks
from milepost.errors import UnsafeCheckpointError

pl = pytest.importorskip("pytorch_lightning")

LIGHTNINGS_OWN = [
    "ignore:.*does not have many workers",
    "ignore:.*is smaller than the logging interval",
    "ignore:You're resuming from a checkpoint that ended before",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:The dirpath has changed from",
    "ignore:.*isinstance.treespec, LeafSpec",
    "ignore:.*val_dataloader",
    "ignore:GPU available but not used",
    "ignore:.*pkg_resources",
]
pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNINGS_OWN]
BATCHES, HELD = 6, "val_loss"


class Colour(enum.Enum):
    RED = "red"


def module(side: Any, **hparams: Any) -> Any:
    """The same job on either side; it notes which batches it saw, and nothing in it is random."""

    class Line(side.LightningModule):  # type: ignore[misc]
        def __init__(self, width: int = 4, root: Any = None, colour: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = torch.nn.Linear(width, 1)
            self.seen: list[tuple[int, int, float]] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.seen.append((self.current_epoch, batch_idx, float(batch[0][0, 0])))
            loss: torch.Tensor = (self.net(batch[0]) - batch[1]).square().mean()
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log(HELD, (self.net(batch[0]) - batch[1]).square().mean())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    torch.manual_seed(3)
    return Line(**hparams)


def loader() -> DataLoader[tuple[torch.Tensor, ...]]:
    inputs = torch.randn(4 * BATCHES, 4, generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=4)


def fit(side: Any, place: Path, epochs: int = 4, resume: Path | None = None, **options: Any) -> tuple[Any, Any]:
    """Train to `epochs`, keeping the best two and the last, with early stopping that never stops."""
    hparams, build = options.pop("hparams", {}), options.pop("build", module)
    saves = side.callbacks.ModelCheckpoint(dirpath=place, monitor=HELD, save_top_k=2, save_last=True, **options)
    stopper = side.callbacks.EarlyStopping(HELD, patience=50)
    trainer = side.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, callbacks=[stopper, saves], enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1, default_root_dir=place,
    )  # fmt: skip
    model = build(side, **hparams)
    trainer.fit(model, loader(), loader(), ckpt_path=None if resume is None else str(resume))
    return trainer, model


def fit_stepwise(side: Any, place: Path, epochs: int = 2, resume: Path | None = None) -> tuple[Any, Any]:
    """Train with a file after every 8 optimizer steps: the first, ``8.ckpt``, lies two batches inside epoch 1."""
    every = side.callbacks.ModelCheckpoint(
        dirpath=place, filename="{step}", every_n_train_steps=8, save_top_k=-1, auto_insert_metric_name=False
    )
    trainer = side.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, callbacks=[every], enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    model = module(side)
    trainer.fit(model, loader(), loader(), ckpt_path=None if resume is None else str(resume))
    return trainer, model


def same(left: Any, right: Any) -> bool:
    other = right.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in left.state_dict().items())


BOTH_WAYS = pytest.mark.parametrize(("writer", "reader"), [(pl, milepost), (milepost, pl)], ids=["pl", "milepost"])


@BOTH_WAYS
def test_callbacks_optimizer_and_scheduler_go_on_from_an_epochs_end(writer: Any, reader: Any, tmp_path: Path) -> None:
    first, _ = fit(writer, tmp_path / "run", epochs=2)
    resumed, model = fit(reader, tmp_path / "run", resume=tmp_path / "run/last.ckpt")
    _, own = fit(pl, tmp_path / "own", resume=tmp_path / "run/last.ckpt")
    unbroken, whole = fit(reader, tmp_path / "whole")

    assert model.seen[0][:2] == (2, 0)
    assert (resumed.global_step, resumed.current_epoch) == (4 * BATCHES, 4)
    assert same(model, own), "our resume and Lightning's own part"
    assert same(model, whole)
    state = resumed.optimizers[0].state_dict()["state"]
    assert all(float(entry["step"]) == 4 * BATCHES for entry in state.values())
    assert resumed.lr_scheduler_configs[0].scheduler.last_epoch == 4
    stopper, reference = resumed.early_stopping_callback, unbroken.early_stopping_callback
    assert (stopper.wait_count, float(stopper.best_score)) == (reference.wait_count, float(reference.best_score))
    kept, expected = resumed.checkpoint_callback, unbroken.checkpoint_callback
    assert sorted(Path(p).name for p in kept.best_k_models) == sorted(Path(p).name for p in expected.best_k_models)
    assert Path(kept.best_model_path).name == Path(expected.best_model_path).name
    files = sorted(p.name for p in (tmp_path / "run").glob("epoch*"))
    assert files == sorted(p.name for p in (tmp_path / "whole").glob("epoch*")), "files of before were not retired"
    assert len(first.checkpoint_callback.best_k_models) == 2


@BOTH_WAYS
def test_early_stopping_keeps_its_count(writer: Any, reader: Any, tmp_path: Path) -> None:
    fit(writer, tmp_path / "run", epochs=2)
    path = tmp_path / "run/last.ckpt"
    raw = torch.load(path, weights_only=True)
    key = next(k for k in raw["callbacks"] if k.startswith("EarlyStopping"))
    raw["callbacks"][key].update(wait_count=49, best_score=torch.tensor(0.0))
    torch.save(raw, tmp_path / "tired.ckpt")
    trainer, _ = fit(reader, tmp_path / "next", resume=tmp_path / "tired.ckpt")
    assert trainer.current_epoch == 3, "a patience of 50 ends at the next validation"
    assert trainer.early_stopping_callback.stopped_epoch == 2


def test_a_lightning_file_from_inside_an_epoch_goes_on_at_its_batch(tmp_path: Path) -> None:
    fit_stepwise(pl, tmp_path)
    with pytest.warns(UserWarning, match="written by Lightning in the middle of an epoch"):
        trainer, model = fit_stepwise(milepost, tmp_path, epochs=4, resume=tmp_path / "8.ckpt")
    batches = [batch[0][0, 0].item() for batch in loader()]
    assert model.seen[0] == (1, 2, batches[2])
    assert [index for epoch, index, _ in model.seen if epoch == 1] == [2, 3, 4, 5]
    assert trainer.global_step == 4 * BATCHES
    _, whole = fit_stepwise(milepost, tmp_path / "whole", epochs=4)
    assert same(model, whole), "where data are not shuffled the file lacks nothing"


def test_lightning_goes_on_from_our_file_of_inside_an_epoch(tmp_path: Path) -> None:
    fit_stepwise(milepost, tmp_path / "ours")
    fit_stepwise(pl, tmp_path / "theirs")
    trainer, model = fit_stepwise(pl, tmp_path / "ours", epochs=4, resume=tmp_path / "ours/8.ckpt")
    reference, other = fit_stepwise(pl, tmp_path / "theirs", epochs=4, resume=tmp_path / "theirs/8.ckpt")
    assert [index for epoch, index, _ in model.seen if epoch == 1] == [2, 3, 4, 5]
    assert trainer.global_step == reference.global_step == 4 * BATCHES
    assert model.seen == other.seen
    assert same(model, other), "Lightning resumes our file as it resumes its own"


def test_hyper_parameters_load_in_lightning_as_plain_values(tmp_path: Path) -> None:
    hparams = {"root": Path("some") / "where", "colour": Colour.RED}
    _, trained = fit(milepost, tmp_path, epochs=1, hparams=hparams)
    loaded = type(module(pl)).load_from_checkpoint(tmp_path / "last.ckpt")
    assert same(loaded, trained)
    assert loaded.hparams["width"] == 4
    plain = torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]
    assert "where" in str(plain["root"]) and "red" in str(plain["colour"]).lower()
    assert not isinstance(plain["root"], Path) and not isinstance(plain["colour"], Colour)
    ours = type(module(milepost)).load_from_checkpoint(tmp_path / "last.ckpt")
    assert str(ours.hparams["root"]) == str(hparams["root"])


def test_a_path_in_lightnings_hyper_parameters_is_refused_by_name_and_loads_on_request(tmp_path: Path) -> None:
    fit(pl, tmp_path, epochs=1, hparams={"root": Path("x")})
    with pytest.raises(UnsafeCheckpointError, match=r"hyper_parameters\.root.*pathlib"):
        type(module(milepost)).load_from_checkpoint(tmp_path / "last.ckpt")
    loaded = type(module(milepost)).load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert loaded.hparams["root"] == Path("x")


def plateau(side: Any) -> Any:
    class Plateau(type(module(side))):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, threshold=0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": HELD}}

    return Plateau()


def plateau_state(trainer: Any) -> Any:
    return trainer.lr_scheduler_configs[0].scheduler.state_dict()


@pytest.mark.parametrize("hook", [True, False], ids=["train epoch end", "validation end"])
@pytest.mark.parametrize("file", ["last", "best"])
def test_a_plateau_takes_the_step_that_lightning_saves_before(hook: bool, file: str, tmp_path: Path) -> None:
    written, _ = fit(pl, tmp_path / "run", epochs=3, build=plateau, save_on_train_epoch_end=hook)
    path = tmp_path / "run/last.ckpt" if file == "last" else Path(written.checkpoint_callback.best_model_path)
    resumed, model = fit(milepost, tmp_path / "next", resume=path, build=plateau, epochs=5)
    unbroken, whole = fit(milepost, tmp_path / "whole", build=plateau, epochs=5)
    assert plateau_state(resumed) == plateau_state(unbroken)
    assert plateau_state(resumed)["last_epoch"] == 5
    assert same(model, whole)


def test_lightning_leaves_that_step_out_of_our_file_as_of_its_own(tmp_path: Path) -> None:
    resumed = {}
    for side in (pl, milepost):
        fit(side, tmp_path / side.__name__, epochs=3, build=plateau)
        path = tmp_path / side.__name__ / "last.ckpt"
        resumed[side] = fit(pl, tmp_path / "next", resume=path, build=plateau, epochs=5)
    assert plateau_state(resumed[milepost][0]) == plateau_state(resumed[pl][0])
    assert plateau_state(resumed[milepost][0])["last_epoch"] == 4
    assert same(resumed[milepost][1], resumed[pl][1])


def test_a_plateau_whose_metric_no_callback_watched_waits_for_the_next_epoch(tmp_path: Path) -> None:
    fit(pl, tmp_path, epochs=2, build=plateau)
    raw = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del raw["callbacks"]
    torch.save(raw, tmp_path / "bare.ckpt")
    with pytest.warns(UserWarning, match="monitors 'val_loss', which was not logged.*left as it is"):
        trainer, _ = fit(milepost, tmp_path, resume=tmp_path / "bare.ckpt", build=plateau)
    assert trainer.global_step == 4 * BATCHES
    assert plateau_state(trainer)["last_epoch"] == 3, "one step each for epochs 0, 2 and 3"
