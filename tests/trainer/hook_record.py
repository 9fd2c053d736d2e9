"""One program that notes every hook call, written once and run by Lightning and by Milepost (`side` is either)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

HELD_BATCHES, ACCUMULATE = 2, 2


class Event(NamedTuple):
    """A call: whose hook, which, what it was given, what is to be seen from inside it, and within how many others."""

    owner: str
    hook: str
    given: tuple[Any, ...] = ()
    seen: tuple[tuple[str, Any], ...] = ()
    depth: int = 0

    def __str__(self) -> str:
        given = ", ".join(map(str, self.given))
        seen = " ".join(f"{name}={value}" for name, value in self.seen)
        return f"{'  ' * self.depth}{self.owner}.{self.hook}({given})  {seen}"


class Record:
    """The events of a run, in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.trainer: Any = None
        self._depth = 0

    @contextmanager
    def call(self, owner: str, hook: str, *given: Any) -> Iterator[None]:
        self.events.append(Event(owner, hook, tuple(_plain(value) for value in given), self._seen(hook), self._depth))
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def _seen(self, hook: str) -> tuple[tuple[str, Any], ...]:
        trainer = self.trainer
        module = None if trainer is None else trainer.lightning_module
        if module is None or hook == "connect":
            return ()  # the run has not begun
        stage = trainer.state.stage
        return (
            ("step", trainer.global_step),
            ("epoch", trainer.current_epoch),
            ("last_batch", bool(trainer.is_last_batch)),
            ("stage", getattr(stage, "value", stage)),
            ("train_mode", module.training),
            ("grad", torch.is_grad_enabled()),
            ("inference", torch.is_inference_mode_enabled()),
            ("gradients", any(p.grad is not None for p in module.parameters())),
            ("metrics", tuple(sorted(trainer.callback_metrics))),
        )


def _plain(value: Any) -> Any:
    """`value` in a form that is equal on both sides when it means the same."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (str, Path)):
        return Path(value).name
    if isinstance(value, torch.Tensor):
        return f"tensor{tuple(value.shape)}"
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, dict):
        return "{" + " ".join(sorted(str(key) for key in value)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(str(_plain(item)) for item in value) + "]"
    if isinstance(value, torch.optim.Optimizer):
        return "optimizer"
    if callable(value) and not hasattr(value, "state_key"):
        return "function"
    return value.__class__.__name__  # of what it stands for, where it is a weak reference


def recorded(cls: type, owner: str, names: Iterable[str], record: Record, skip: int = 0) -> type:
    """A class derived from `cls` that notes the calls of `names`, less the first `skip` arguments of each."""

    def noting(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **options: Any) -> Any:
            with record.call(owner, name, *args[skip:], *options.values()):
                return getattr(super(derived, self), name)(*args, **options)

        return method

    derived = type(cls.__name__, (cls,), {name: noting(name) for name in names})
    return derived


# ---- the names of Lightning's hooks, read off its classes ----------------------------------------------------------


def names_of(*classes: type) -> list[str]:
    """Public functions that `classes` define, in alphabetical order."""
    return sorted(
        {
            name
            for cls in classes
            for name, value in vars(cls).items()
            if callable(value) and not name.startswith("_") and not isinstance(value, (property, classmethod, type))
        }
    )


def module_names() -> list[str]:
    from pytorch_lightning.core.hooks import CheckpointHooks, DataHooks, ModelHooks

    own = (
        "configure_callbacks", "configure_optimizers", "configure_gradient_clipping", "backward", "optimizer_step",
        "optimizer_zero_grad", "lr_scheduler_step",
    )  # fmt: skip
    return sorted({*names_of(ModelHooks, DataHooks, CheckpointHooks), *own})


def data_names() -> list[str]:
    from pytorch_lightning import LightningDataModule
    from pytorch_lightning.core.hooks import CheckpointHooks, DataHooks

    return sorted({*names_of(DataHooks, CheckpointHooks, LightningDataModule)})


def callback_names() -> list[str]:
    from pytorch_lightning import Callback

    return names_of(Callback)


STRATEGY = ("connect", "setup", "save_checkpoint", "load_checkpoint", "remove_checkpoint", "on_exception", "teardown")
LOGGER = ("log_hyperparams", "log_metrics", "save", "finalize", "after_save_checkpoint")
STORAGE = (
    "save_checkpoint",
    "load_checkpoint",
    "remove_checkpoint",
    "teardown",
    "exists",
    "list",
    "verify",
    "link",
    "check",
)


# ---- the program ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """In what a program differs from the next one. Numbers are batches of an epoch."""

    manual: bool = False  # manual optimization
    data: bool = True  # loaders come from a data module
    sharded: bool = False  # the module has the older configure_sharded_model
    streamed: bool = False  # training data of unknown length
    batches: int = 6
    held_loaders: int = 1
    skip_at: int = -1  # the rest of the epoch
    empty_at: int = -1  # training_step returns None
    stop_at: int = -1  # training_step asks for a stop
    fails: str = ""  # the step that raises, in its second epoch
    saves: Mapping[str, Any] = field(default_factory=lambda: {"every_n_train_steps": 2, "save_top_k": -1})
    trainer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def monitor(self) -> str:
        return "held" if self.held_loaders == 1 else "held/dataloader_idx_1"


class Stream(IterableDataset[torch.Tensor]):
    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[tuple[torch.Tensor]]:
        yield from ((row,) for row in _rows(self.rows))


def _rows(count: int) -> torch.Tensor:
    return torch.arange(3.0 * count).reshape(count, 3) / 30


def loaders(job: Job) -> type:
    """Where batches come from, for the module or the data module."""

    def loader(batches: int, streamed: bool = False) -> Any:
        rows = 2 * batches
        return DataLoader(Stream(rows) if streamed else TensorDataset(_rows(rows)), batch_size=2)

    class Loaders:
        def train_dataloader(self) -> Any:
            return loader(job.batches, job.streamed)

        def val_dataloader(self) -> Any:
            return loader(HELD_BATCHES) if job.held_loaders == 1 else [loader(1) for _ in range(job.held_loaders)]

        def test_dataloader(self) -> Any:
            return [loader(HELD_BATCHES), loader(1)]

        def predict_dataloader(self) -> Any:
            return loader(HELD_BATCHES)

    return Loaders


class Program:
    """The parts of one run on `side`, which all write into one `record`."""

    def __init__(self, side: Any, place: Path, job: Job) -> None:
        self.side, self.place, self.job = side, place, job
        self.record = Record()
        self.module = self._module()
        self.data = self._data() if job.data else None

    def again(self) -> Program:
        """The same program in a process of its own."""
        return Program(self.side, self.place, self.job)

    def trainer(self, **options: Any) -> Any:
        side, record, job = self.side, self.record, self.job
        callbacks = side.callbacks
        names = callback_names()
        plain = recorded(side.Callback, "callback", names, record, skip=2)
        keeper = recorded(callbacks.Checkpoint, "checkpointer", names, record, skip=2)
        saver = recorded(callbacks.ModelCheckpoint, "model_checkpoint", names, record, skip=2)
        stopper = recorded(callbacks.EarlyStopping, "early_stopping", names, record, skip=2)
        strategy = recorded(side.strategies.SingleDeviceStrategy, "strategy", STRATEGY, record)
        trainer = side.Trainer(
            strategy=strategy(torch.device("cpu"), checkpoint_io=self._storage()),
            callbacks=[
                keeper(),
                saver(self.place, "{epoch}-{step}", **job.saves),
                stopper(job.monitor, patience=90),
                plain(),
            ],
            logger=self._logger(),
            **{
                "max_epochs": 2, "accumulate_grad_batches": 1 if job.manual else ACCUMULATE,
                "gradient_clip_val": None if job.manual else 1.0,
                "val_check_interval": 4, "num_sanity_val_steps": 1, "log_every_n_steps": 2,
                "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": self.place,
                **job.trainer, **options,
            },
        )  # fmt: skip
        record.trainer = trainer
        return trainer

    def _module(self) -> Any:
        side, record, job = self.side, self.record, self.job

        class Line(loaders(job), self.side.LightningModule):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = not job.manual
                self.save_hyperparameters({"width": 3})
                self.net = torch.nn.Linear(3, 1)

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                with record.call("module", "training_step", batch, batch_idx):
                    self._maybe_fail("training_step")
                    if batch_idx == job.stop_at:
                        self.trainer.should_stop = True
                    if batch_idx == job.empty_at:
                        return None
                    loss = self.net(batch[0]).square().mean()
                    self.log("loss", loss, on_step=True, on_epoch=True)
                    return self._step_by_hand(loss, batch_idx) if job.manual else loss

            def _maybe_fail(self, step: str) -> None:
                if job.fails == step and self.current_epoch == 1:
                    raise ArithmeticError("meant")

            def _step_by_hand(self, loss: torch.Tensor, batch_idx: int) -> None:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 1.0, "norm")
                optimizer.step()
                if batch_idx % 2:
                    self.lr_schedulers()[0].step()

            def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
                with record.call("module", "validation_step", batch, batch_idx, dataloader_idx):
                    self._maybe_fail("validation_step")
                    self.log("held", self.net(batch[0]).square().mean())

            def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
                with record.call("module", "test_step", batch, batch_idx, dataloader_idx):
                    self.log("tested", self.net(batch[0]).square().mean())
                    return {"some": 1}

            def predict_step(self, batch: Any, batch_idx: int) -> Any:
                with record.call("module", "predict_step", batch, batch_idx):
                    return self.net(batch[0])

            def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
                return -1 if batch_idx == job.skip_at else None

            def on_train_epoch_end(self) -> None:
                self.log("late", 1.0)

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
                step, epoch, plateau = (
                    torch.optim.lr_scheduler.StepLR(optimizer, 2),
                    torch.optim.lr_scheduler.StepLR(optimizer, 1),
                    torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
                )
                return [optimizer], [
                    {"scheduler": step, "interval": "step"},
                    {"scheduler": epoch, "interval": "epoch"},
                    {"scheduler": plateau, "monitor": job.monitor, "interval": "epoch"},
                ]

            def configure_callbacks(self) -> Any:
                return [recorded(side.Callback, "module's callback", callback_names(), record, skip=2)()]

        torch.manual_seed(3)
        unused = {"configure_model" if job.sharded else "configure_sharded_model"}  # Lightning refuses both in one
        return recorded(Line, "module", set(module_names()) - unused, record)()

    def _data(self) -> Any:
        class Numbers(loaders(self.job), self.side.LightningDataModule):  # type: ignore[misc]
            def state_dict(self) -> dict[str, Any]:
                return {"place": 1}

        return recorded(Numbers, "data", data_names(), self.record)()

    def _storage(self) -> Any:
        record, built_in = self.record, self.side.plugins.TorchCheckpointIO

        class Storage(built_in):  # type: ignore[misc, valid-type]
            def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
                with record.call("storage", "load_checkpoint", path):
                    return super().load_checkpoint(path, map_location=map_location, weights_only=weights_only)

        offered = [name for name in STORAGE if hasattr(built_in, name) and name != "load_checkpoint"]
        return recorded(Storage, "storage", offered, record)()

    def _logger(self) -> Any:
        place = str(self.place)

        class Silent(self.side.loggers.Logger):  # type: ignore[misc]
            name, version, save_dir = "silent", 0, place

            def log_metrics(self, metrics: Any, step: Any = None) -> None: ...

            def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

        return recorded(Silent, "logger", LOGGER, self.record)()
