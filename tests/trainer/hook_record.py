"""One program that notes every hook call, written once and run by Lightning and by Milepost (`side` is either)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, TensorDataset

TRAIN_BATCHES, HELD_BATCHES, ACCUMULATE = 6, 2, 2
STEPS = ("training_step", "validation_step", "test_step", "predict_step")


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
RESUMED = "resumed"


# ---- the program ---------------------------------------------------------------------------------------------------


class Loaders:
    """Where batches come from, for the module and the data module."""

    def train_dataloader(self) -> Any:
        return _loader(TRAIN_BATCHES)

    def val_dataloader(self) -> Any:
        return _loader(HELD_BATCHES)

    def test_dataloader(self) -> Any:
        return [_loader(HELD_BATCHES), _loader(1)]

    def predict_dataloader(self) -> Any:
        return _loader(HELD_BATCHES)


class Program:
    """The parts of one run on `side`, which all write into one `record`."""

    def __init__(
        self, side: Any, place: Path, *, manual: bool = False, last: bool = False, data: bool = True,
        sharded: bool = False, fail_at: int = -1, skip_at: int = -1,
    ) -> None:  # fmt: skip
        self.side, self.place = side, place
        self.record = Record()
        self.last, self.manual, self.fail_at, self.skip_at = last, manual, fail_at, skip_at
        self.sharded = sharded
        self.module = self._module()
        self.data = self._data() if data else None

    def trainer(self, **options: Any) -> Any:
        side, record = self.side, self.record
        callbacks = side.callbacks
        names = callback_names()
        plain = recorded(side.Callback, "callback", names, record, skip=2)
        keeper = recorded(callbacks.Checkpoint, "checkpointer", names, record, skip=2)
        saver = recorded(callbacks.ModelCheckpoint, "model_checkpoint", names, record, skip=2)
        stopper = recorded(callbacks.EarlyStopping, "early_stopping", names, record, skip=2)
        storage = self._storage()
        strategy = recorded(side.strategies.SingleDeviceStrategy, "strategy", STRATEGY, record)
        self.storage = storage
        trainer = side.Trainer(
            strategy=strategy(torch.device("cpu"), checkpoint_io=storage),
            callbacks=[
                keeper(),
                saver(self.place, "{epoch}-{step}", every_n_train_steps=2, save_top_k=-1, save_last=self.last),
                stopper("held", patience=90),
                plain(),
            ],
            logger=self._logger(),
            **{
                "max_epochs": 2, "accumulate_grad_batches": 1 if self.manual else ACCUMULATE,
                "gradient_clip_val": None if self.manual else 1.0,
                "val_check_interval": 4, "num_sanity_val_steps": 1, "log_every_n_steps": 2,
                "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": self.place,
                **options,
            },
        )  # fmt: skip
        record.trainer = trainer
        return trainer

    def _module(self) -> Any:
        program, record = self, self.record

        class Line(Loaders, self.side.LightningModule):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = not program.manual
                self.save_hyperparameters({"width": 3})
                self.net = torch.nn.Linear(3, 1)

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                with record.call("module", "training_step", batch, batch_idx):
                    if batch_idx == program.fail_at and self.current_epoch == 1:
                        raise ArithmeticError("meant")
                    loss = self.net(batch[0]).square().mean()
                    self.log("loss", loss, on_step=True, on_epoch=True)
                    return self._step_by_hand(loss, batch_idx) if program.manual else loss

            def _step_by_hand(self, loss: torch.Tensor, batch_idx: int) -> None:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 1.0, "norm")
                optimizer.step()
                if batch_idx % 2:
                    self.lr_schedulers()[0].step()

            def validation_step(self, batch: Any, batch_idx: int) -> Any:
                with record.call("module", "validation_step", batch, batch_idx):
                    self.log("held", self.net(batch[0]).square().mean())

            def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
                with record.call("module", "test_step", batch, batch_idx, dataloader_idx):
                    self.log("tested", self.net(batch[0]).square().mean())
                    return {"some": 1}

            def predict_step(self, batch: Any, batch_idx: int) -> Any:
                with record.call("module", "predict_step", batch, batch_idx):
                    return self.net(batch[0])

            def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
                return -1 if batch_idx == program.skip_at else None

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
                    {"scheduler": plateau, "monitor": "held", "interval": "epoch"},
                ]

            def configure_callbacks(self) -> Any:
                return [recorded(program.side.Callback, "module's callback", callback_names(), record, skip=2)()]

        torch.manual_seed(3)
        unused = {"configure_model" if self.sharded else "configure_sharded_model"}  # Lightning refuses both in one
        return recorded(Line, "module", set(module_names()) - unused, record)()

    def _data(self) -> Any:
        class Numbers(Loaders, self.side.LightningDataModule):  # type: ignore[misc]
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


def _loader(batches: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(TensorDataset(torch.arange(6.0 * batches).reshape(2 * batches, 3) / 30), batch_size=2)


# ---- what is done with it ------------------------------------------------------------------------------------------


def fit(program: Program, **options: Any) -> None:
    program.trainer(**options).fit(program.module, datamodule=program.data)


def validate_late(program: Program) -> None:
    fit(program, check_val_every_n_epoch=2, val_check_interval=1.0, num_sanity_val_steps=0)


def save(program: Program) -> None:
    trainer = program.trainer(max_epochs=1)
    trainer.fit(program.module, datamodule=program.data)
    program.record.events.clear()
    trainer.save_checkpoint(program.place / "by_hand.ckpt")
    trainer.save_checkpoint(program.place / "weights.ckpt", weights_only=True)


def resume(program: Program, name: str) -> None:
    """An unbroken run, then one that goes on from its checkpoint `name`; between them stands `RESUMED`."""
    fit(program, max_epochs=3)
    for file in program.place.glob("*.ckpt"):
        if file.name != name:
            file.unlink()  # as if the run had been killed after that save
    again = Program(program.side, program.place)
    again.trainer(max_epochs=3).fit(again.module, datamodule=again.data, ckpt_path=str(program.place / name))
    program.record.events += [Event(RESUMED, name), *again.record.events]


def evaluate(program: Program, fn: str) -> None:
    fit(program, max_epochs=2)
    again = Program(program.side, program.place, data=program.data is not None)
    options = {} if fn == "predict" else {"verbose": False}
    path = str(program.place / "epoch=1-step=6.ckpt")
    getattr(again.trainer(), fn)(again.module, datamodule=again.data, ckpt_path=path, **options)
    program.record = again.record


def fail(program: Program) -> None:
    try:
        fit(program)
    except ArithmeticError:
        return
    raise AssertionError("training_step was to raise")


SCENARIOS: dict[str, tuple[dict[str, Any], Callable[[Program], None]]] = {
    "fit": ({}, fit),
    "fit, keeping the last": ({"last": True}, fit),
    "fit, data in the module": ({"data": False, "sharded": True}, fit),
    "fit by hand": ({"manual": True}, fit),
    "fit by hand, validating late": ({"manual": True}, validate_late),
    "fit, skipping": ({"skip_at": 4}, fit),
    "fit, failing": ({"fail_at": 3}, fail),
    "save": ({}, save),
    "resume midway": ({}, lambda program: resume(program, "epoch=0-step=2.ckpt")),
    "resume at the end": ({}, lambda program: resume(program, "epoch=1-step=6.ckpt")),
    "test, data in the module": ({"data": False}, lambda program: evaluate(program, "test")),
    "predict, data in the module": ({"data": False}, lambda program: evaluate(program, "predict")),
    "validate": ({}, lambda program: evaluate(program, "validate")),
    "test": ({}, lambda program: evaluate(program, "test")),
    "predict": ({}, lambda program: evaluate(program, "predict")),
}


def run(side: Any, scenario: str, place: Path) -> list[Event]:
    """The events of `scenario` on `side`, with files in `place`."""
    options, act = SCENARIOS[scenario]
    program = Program(side, place, **options)
    act(program)
    return program.record.events
