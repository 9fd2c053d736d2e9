"""Runs one module with Milepost and with pytorch-lightning, and writes down all that can be seen of the run."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import milepost
import milepost.callbacks
import milepost.loggers

LIBRARIES = {"milepost": milepost, "lightning": pytorch_lightning}
SETTINGS: dict[str, Any] = {
    "accelerator": "cpu",
    "max_epochs": 2,
    "log_every_n_steps": 2,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass
class Record:
    """What a run did, in the order in which it did it, and what it left behind."""

    events: list[Any] = field(default_factory=list)
    logged: list[Any] = field(default_factory=list)  # what a logger got
    left: dict[str, Any] = field(default_factory=dict)  # state of module and trainer after the run
    error: type[BaseException] | None = None


def dataset(samples: int = 20, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(samples, 3, generator=generator), torch.randn(samples, 1, generator=generator))


def loader(batches: int = 6, size: int = 4, seed: int = 1, short: int = 1) -> DataLoader[Any]:
    """`batches` batches in fixed order; the last one lacks `short` samples, so that means are weighted."""
    return DataLoader(dataset(batches * size - short, seed), batch_size=size)


class Flow(IterableDataset[Any]):
    """A dataset that does not know its length."""

    def __init__(self, samples: int = 23, seed: int = 1) -> None:
        self.data = dataset(samples, seed)

    def __iter__(self) -> Iterator[Any]:
        return iter([self.data[i] for i in range(len(self.data))])


def module_of(library: Any, record: Record) -> type[Any]:
    """The module that most cases train, derived from `library`'s; cases derive from it in turn."""

    class Net(library.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 1))

        def note(self, *event: Any) -> None:
            record.events.append(event)

        def where(self) -> tuple[int, int]:
            return self.trainer.current_epoch, self.trainer.global_step

        def loss(self, batch: Any) -> torch.Tensor:
            return (self.layer(batch[0]) - batch[1]).square().mean()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.note("train", *self.where(), batch_idx, loss.item(), self.trainer.is_last_batch)
            self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            rates = [group["lr"] for o in self.trainer.optimizers for group in o.param_groups]
            self.note("end", *self.where(), batch_idx, rates, outputs)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.note("val", self.trainer.sanity_checking, *self.where(), batch_idx, loss.item(), self.training)
            self.log("val_loss", loss, prog_bar=True)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.loss(batch))

        def on_train_epoch_start(self) -> None:
            self.note("epoch", *self.where())

        def on_train_epoch_end(self) -> None:
            self.note("epoch_end", *self.where(), views(self.trainer))

        def on_validation_epoch_end(self) -> None:
            self.note("val_end", *self.where(), views(self.trainer))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    return Net


def views(trainer: Any) -> dict[str, Any]:
    """The three dicts of metrics that users read."""
    names = ("callback_metrics", "logged_metrics", "progress_bar_metrics")
    return {name: plain(dict(getattr(trainer, name))) for name in names}


def plain(value: Any) -> Any:
    """`value` with numbers for scalar tensors, so that ``==`` compares."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def logger_of(library: Any, record: Record) -> Any:
    """A logger that writes into `record`."""

    class Notes(library.loggers.Logger):  # type: ignore[misc]
        name = version = "notes"

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            record.logged.append((step, plain(dict(metrics))))

    return Notes()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    level = logging.getLogger("pytorch_lightning").level
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("pytorch_lightning").setLevel(level)


Case = Callable[[Any, Record], None]


def run(case: Case, name: str) -> Record:
    """Run `case` with the library called `name`, from the same random state each time."""
    record = Record()
    torch.manual_seed(7)
    with _quiet():
        try:
            case(LIBRARIES[name], record)
        except Exception as error:
            record.error = type(error)
            record.left["error"] = str(error)
    return record


def fit(library: Any, record: Record, net: Any, *loaders: Any, **options: Any) -> Any:
    """Fit `net`, and note what is left. Returns the trainer."""
    settings = {**SETTINGS, "logger": logger_of(library, record), **options}
    datamodule = settings.pop("datamodule", None)
    trainer = library.Trainer(**settings)
    try:
        trainer.fit(net, *loaders, datamodule=datamodule)
    finally:
        note_left(record, net, trainer)
    return trainer


def note_left(record: Record, net: Any, trainer: Any) -> None:
    record.left |= {
        "weights": plain(dict(net.state_dict())),
        "global_step": trainer.global_step,
        "current_epoch": trainer.current_epoch,
        "should_stop": trainer.should_stop,
        "training": net.training,
        "optimizers": plain([o.state_dict() for o in trainer.optimizers]),
        **views(trainer),
    }


def check(case: Case) -> tuple[Record, Record]:
    """Run `case` with both; all that was written down must be equal. Returns ours and theirs."""
    ours, theirs = run(case, "milepost"), run(case, "lightning")
    found = differences(ours, theirs)
    assert not found, "\n".join(found)
    return ours, theirs


def differences(ours: Record, theirs: Record) -> list[str]:
    """What differs, a line each. Where both have refused, that is all there is to compare."""
    if ours.error is not None and theirs.error is not None:
        return []
    found = []
    for name in ("events", "logged"):
        a, b = plain(getattr(ours, name)), plain(getattr(theirs, name))
        for index in range(max(len(a), len(b))):
            left, right = (items[index] if index < len(items) else "nothing" for items in (a, b))
            if not same(left, right):
                found.append(f"{name}[{index}]: {left}, Lightning: {right}")
                break
    if (ours.error is None) != (theirs.error is None):
        found.append(
            f"error: {ours.error} {ours.left.get('error')}, Lightning: {theirs.error} {theirs.left.get('error')}"
        )
    for key in sorted({*ours.left, *theirs.left} - {"error"}):
        a, b = ours.left.get(key, "nothing"), theirs.left.get(key, "nothing")
        if not same(a, b):
            found.append(f"left[{key}]: {a}, Lightning: {b}")
    return found


def same(a: Any, b: Any) -> bool:
    """Equality, with NaN equal to itself."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (a != a and b != b)
