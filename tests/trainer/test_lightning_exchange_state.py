"""Every part of a file, beside that of the same job on Lightning, and put back on the other side."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import milepost
from milepost.errors import ResumeError

pl = pytest.importorskip("pytorch_lightning")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the other library

BOTH_WAYS = pytest.mark.parametrize(("writer", "reader"), [(pl, milepost), (milepost, pl)], ids=["pl", "milepost"])
BATCHES = 6


def loader() -> DataLoader[Any]:
    inputs = torch.randn(2 * BATCHES, 2, generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=2)


def line(side: Any, net: Any = None) -> Any:
    class Line(side.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(2, 1) if net is None else net

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.net(batch[0]) - batch[1]).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("held", (self.net(batch[0]) - batch[1]).square().mean())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    torch.manual_seed(3)
    return Line()


def pair(side: Any) -> Any:
    """Two optimizers with a scheduler each, in manual optimization."""

    class Pair(side.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.first, self.second = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
            self.steps: list[int] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.steps.append(self.global_step)
            for net, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward((net(batch[0]) - batch[1]).square().mean())
                optimizer.step()

        def on_train_epoch_end(self) -> None:
            for scheduler in self.lr_schedulers():
                scheduler.step()

        def configure_optimizers(self) -> Any:
            optimizers = [torch.optim.Adam(net.parameters(), lr=0.05) for net in (self.first, self.second)]
            return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]

    torch.manual_seed(3)
    return Pair()


def fit(side: Any, model: Any, place: Path, epochs: int, resume: Path | None = None, **options: Any) -> Any:
    """Train to `epochs`. Options of ModelCheckpoint and of the Trainer may be mixed."""
    own = {
        k: options.pop(k) for k in list(options) if k in inspect.signature(side.callbacks.ModelCheckpoint).parameters
    }
    callbacks = [*options.pop("callbacks", []), side.callbacks.ModelCheckpoint(dirpath=place, **own)]
    trainer = side.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, callbacks=callbacks, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, **{"num_sanity_val_steps": 1, **options},
    )  # fmt: skip
    validates = any("validation_step" in vars(kind) for kind in type(model).__mro__ if kind.__module__ == __name__)
    trainer.fit(model, loader(), loader() if validates else None, ckpt_path=None if resume is None else str(resume))
    return trainer


def same(left: Any, right: Any) -> bool:
    other = right.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in left.state_dict().items())


def differences(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys(), key=str):
            if key not in ours or key not in theirs:
                yield f"{path}.{key}: only {'ours' if key in ours else 'theirs'}"
            else:
                yield from differences(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (left, right) in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(left, right, f"{path}.{index}")
    elif isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        if not torch.equal(ours, theirs):
            yield f"{path}: {ours} is not {theirs}"
    elif type(ours) is not type(theirs) or ours != theirs:
        yield f"{path}: {ours!r} is not {theirs!r}"


JOBS = {
    "every epoch": (line, {}),
    "on validation end": (line, {"save_on_train_epoch_end": False}),
    "inside an epoch": (line, {"every_n_train_steps": 4}),
    "validating inside an epoch": (line, {"val_check_interval": 3, "monitor": "held"}),
    "accumulating": (line, {"accumulate_grad_batches": 4, "every_n_train_steps": 1}),
    "manual": (pair, {"every_n_train_steps": 5}),
}


@pytest.mark.parametrize("job", JOBS)
def test_our_files_are_lightnings_but_for_our_key(job: str, tmp_path: Path) -> None:
    build, options = JOBS[job]
    keep = {} if "monitor" in options else {"save_top_k": -1}
    for side in (milepost, pl):
        fit(side, build(side), tmp_path / side.__name__, 2, filename="{epoch}-{step}", **keep, **options)
    names = sorted(path.name for path in (tmp_path / "pytorch_lightning").glob("*.ckpt"))
    assert names == sorted(path.name for path in (tmp_path / "milepost").glob("*.ckpt"))
    for name in names:
        ours, theirs = (torch.load(tmp_path / side / name) for side in ("milepost", "pytorch_lightning"))
        assert set(ours) - set(theirs) == {"milepost"}
        del ours["milepost"]
        assert ours["callbacks"].keys() == theirs["callbacks"].keys()
        del ours["callbacks"], theirs["callbacks"]  # other directories; compared where they are put back
        assert list(differences(ours, theirs)) == [], name


def traced(side: Any, build: Any) -> Any:
    """The job of `build`, which notes each batch that it trains on or validates, and each end of an epoch."""

    class Traced(type(build(side))):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.trace: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.trace.append(("train", self.current_epoch, batch_idx, self.global_step, float(batch[0][0, 0])))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.trace.append(("validate", self.current_epoch, batch_idx, self.global_step))
            super().validation_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            self.trace.append(("end", self.current_epoch))
            super().on_train_epoch_end()

    if build is pair:
        del Traced.validation_step
    torch.manual_seed(3)
    return Traced()


@pytest.mark.parametrize("job", JOBS)
def test_each_file_of_a_job_is_resumed_at_its_place(job: str, tmp_path: Path) -> None:
    """Lightning's file goes on here as if unbroken, data and all; ours goes on there as Lightning's own does."""
    build, options = JOBS[job]
    own = {k: v for k, v in options.items() if k in ("val_check_interval", "accumulate_grad_batches")}
    quiet = {**own, "save_top_k": 0, "num_sanity_val_steps": 0}
    for side in (milepost, pl):
        everything = {**options, "save_top_k": -1, "filename": "{epoch}-{step}"}
        fit(side, build(side), tmp_path / side.__name__, 2, **everything)
    whole = traced(milepost, build)
    fit(milepost, whole, tmp_path / "none", 3, **quiet)
    for file in sorted((tmp_path / "pytorch_lightning").glob("*.ckpt")):
        here, there, reference = traced(milepost, build), traced(pl, build), traced(pl, build)
        fit(milepost, here, tmp_path / "none", 3, file, **quiet)
        assert here.trace == whole.trace[-len(here.trace) :], file.name
        assert same(here, whole), file.name
        fit(pl, there, tmp_path / "none", 3, tmp_path / "milepost" / file.name, **quiet)
        fit(pl, reference, tmp_path / "none", 3, file, **quiet)
        assert there.trace == reference.trace, file.name
        assert same(there, reference), file.name


@BOTH_WAYS
@pytest.mark.parametrize("file", ["epoch=1-step=24", "epoch=1-step=14"])
def test_several_optimizers_and_schedulers_go_on(writer: Any, reader: Any, file: str, tmp_path: Path) -> None:
    every = {"every_n_train_steps": 14} if file.endswith("14") else {}
    fit(writer, pair(writer), tmp_path, 2, filename="{epoch}-{step}", save_top_k=-1, **every)
    resumed, model = pair(reader), pair(reader)
    trainer = fit(reader, resumed, tmp_path / "next", 4, tmp_path / f"{file}.ckpt", save_top_k=0)
    unbroken = fit(reader, model, tmp_path / "whole", 4, save_top_k=0)
    assert trainer.global_step == unbroken.global_step == 2 * 4 * BATCHES
    assert resumed.steps == model.steps[-len(resumed.steps) :]
    if reader is milepost or not every:  # inside an epoch Lightning trains on its first batches once more
        assert same(resumed, model)
    rates = [[c.scheduler.get_last_lr() for c in t.lr_scheduler_configs] for t in (trainer, unbroken)]
    assert rates[0] == rates[1] == [[0.05 * 0.5**4]] * 2


def half(side: Any) -> Any:
    """16-bit training on a CPU, which Lightning takes only as a plugin."""
    if side is milepost:
        return {"precision": "16-mixed"}
    from pytorch_lightning.plugins.precision import MixedPrecision

    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]}


@BOTH_WAYS
def test_the_gradient_scaler_goes_on(writer: Any, reader: Any, tmp_path: Path) -> None:
    fit(writer, line(writer), tmp_path, 1, save_last=True, **half(writer))
    saved = torch.load(tmp_path / "last.ckpt")["MixedPrecision"]
    assert saved["scale"] < 2.0**16, "overflows of the first steps have lowered it"
    resumed, whole = line(reader), line(reader)
    trainer = fit(reader, resumed, tmp_path / "next", 2, tmp_path / "last.ckpt", **half(reader))
    unbroken = fit(reader, whole, tmp_path / "whole", 2, **half(reader))
    scaler, expected = (t.precision_plugin.scaler.state_dict() for t in (trainer, unbroken))
    assert scaler == expected
    assert same(resumed, whole)


@BOTH_WAYS
def test_a_file_of_weights_loads_and_is_refused_for_going_on(writer: Any, reader: Any, tmp_path: Path) -> None:
    trained = line(writer)
    fit(writer, trained, tmp_path, 1, save_last=True, save_weights_only=True)
    raw = torch.load(tmp_path / "last.ckpt")
    assert not {"optimizer_states", "lr_schedulers", "callbacks"} & raw.keys()
    assert same(type(line(reader)).load_from_checkpoint(tmp_path / "last.ckpt"), trained)
    error = ResumeError if reader is milepost else KeyError
    with pytest.raises(error, match=r"checkpoint (holds the model only|contains only the model)"):
        fit(reader, line(reader), tmp_path / "next", 2, tmp_path / "last.ckpt")


@BOTH_WAYS
def test_the_timer_goes_on(writer: Any, reader: Any, tmp_path: Path) -> None:
    fit(writer, line(writer), tmp_path, 1, save_last=True, callbacks=[writer.callbacks.Timer("01:00:00:00")])
    path = tmp_path / "last.ckpt"
    raw = torch.load(path)
    assert raw["callbacks"]["Timer"]["time_elapsed"]["train"] > 0
    raw["callbacks"]["Timer"]["time_elapsed"]["train"] = 5000.0
    torch.save(raw, tmp_path / "late.ckpt")
    timer = reader.callbacks.Timer("01:00:00:00")
    fit(reader, line(reader), tmp_path / "next", 2, tmp_path / "late.ckpt", callbacks=[timer])
    assert 5000 < timer.time_elapsed("train") < 5100


def data(side: Any, **arguments: Any) -> Any:
    class Data(side.LightningDataModule):  # type: ignore[misc]
        def __init__(self, batch_size: int = 2) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.served = 0

        def train_dataloader(self) -> Any:
            self.served += 1
            return loader()

        def state_dict(self) -> dict[str, Any]:
            return {"served": self.served}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.served = state_dict["served"]

    return Data(**arguments)


@BOTH_WAYS
def test_the_data_module_goes_on(writer: Any, reader: Any, tmp_path: Path) -> None:
    def run(side: Any, source: Any, epochs: int, resume: Path | None = None) -> None:
        trainer = side.Trainer(
            accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[side.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True)], limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(line(side), datamodule=source, ckpt_path=resume)

    first, second = data(writer, batch_size=4), data(reader)
    first.served = 40
    run(writer, first, 1)
    run(reader, second, 2, tmp_path / "last.ckpt")
    assert second.served == 42
    loaded = type(data(reader)).load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.hparams["batch_size"] == 2, "of the second run, which went on with its own"


def stepwise_plateau(side: Any) -> Any:
    class Plateau(type(line(side))):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, threshold=0.9)
            options = {"scheduler": scheduler, "monitor": "held", "interval": "step", "strict": False}
            return {"optimizer": optimizer, "lr_scheduler": options}

    torch.manual_seed(3)
    return Plateau()


def test_a_plateau_of_steps_takes_the_one_that_is_due_after_the_validation(tmp_path: Path) -> None:
    options = {"val_check_interval": 3, "monitor": "held", "save_top_k": -1}
    fit(pl, stepwise_plateau(pl), tmp_path, 2, filename="{step}", **options)
    whole = fit(milepost, stepwise_plateau(milepost), tmp_path / "whole", 3, **options)
    for step in (3, 9):
        path = tmp_path / f"step={step}.ckpt"
        resumed = fit(milepost, stepwise_plateau(milepost), tmp_path / "next", 3, path, **options)
        schedulers = [t.lr_scheduler_configs[0].scheduler.state_dict() for t in (resumed, whole)]
        assert schedulers[0] == schedulers[1]
        assert resumed.fit_loop.progress.batches_that_stepped == 3 * BATCHES
        assert same(resumed.lightning_module, whole.lightning_module)


def compiled() -> Any:
    torch.manual_seed(3)
    return torch.compile(torch.nn.Linear(2, 1), backend="eager")


@pytest.mark.parametrize("inside", [True, False], ids=["a part", "the module"])
def test_a_compiled_module_of_lightnings_goes_on_compiled_or_not(inside: bool, tmp_path: Path) -> None:
    trained = line(pl, compiled()) if inside else torch.compile(line(pl), backend="eager")
    fit(pl, trained, tmp_path, 1, save_last=True)
    keys = torch.load(tmp_path / "last.ckpt")["state_dict"].keys()
    assert ("net._orig_mod.weight" in keys) == inside
    whole = line(milepost)
    fit(milepost, whole, tmp_path / "whole", 2)
    for net in (None, compiled()):
        resumed = line(milepost, net)
        fit(milepost, resumed, tmp_path / "next", 2, tmp_path / "last.ckpt")
        ours = [p.tolist() for p in resumed.parameters()]
        assert ours == [p.tolist() for p in whole.parameters()]


def test_our_file_of_a_compiled_module_is_read_by_an_uncompiled_one_of_lightnings(tmp_path: Path) -> None:
    trained = line(milepost, compiled())
    fit(milepost, trained, tmp_path, 1, save_last=True)
    assert "net.weight" in torch.load(tmp_path / "last.ckpt")["state_dict"]
    loaded = type(line(pl)).load_from_checkpoint(tmp_path / "last.ckpt")
    assert [p.tolist() for p in loaded.parameters()] == [p.tolist() for p in trained.parameters()]


@pytest.mark.parametrize("writer", [pl, milepost])
def test_a_file_written_inside_a_validation_does_all_of_it_again(writer: Any, tmp_path: Path) -> None:
    class Saver(writer.Callback):  # type: ignore[misc]
        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if _[2] == 2 and not trainer.sanity_checking and trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    class Count(milepost.Callback):
        batches = 0

        def on_validation_batch_end(self, *_: Any) -> None:
            self.batches += 1

    fit(writer, line(writer), tmp_path, 1, callbacks=[Saver()])
    resumed, whole, count = line(milepost), line(milepost), Count()
    fit(milepost, resumed, tmp_path / "next", 2, tmp_path / "inside.ckpt", callbacks=[count])
    fit(milepost, whole, tmp_path / "whole", 2)
    assert count.batches == 2 * BATCHES
    assert same(resumed, whole)
