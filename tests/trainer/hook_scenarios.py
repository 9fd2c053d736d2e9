"""What is done with the recording program: the runs in which the order of hooks is compared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hook_record import Event, Job, Program

RESUMED = "resumed"
BY_EPOCH = {"val_check_interval": 1.0}
AT_VALIDATION = {"monitor": "held", "save_top_k": -1}
AT_EPOCHS_END = {"save_top_k": -1, "save_on_train_epoch_end": True}


def fit(program: Program) -> None:
    program.trainer().fit(program.module, datamodule=program.data)


def fit_twice(program: Program) -> None:
    """A second fit of one Trainer goes on to a later epoch."""
    trainer = program.trainer(max_epochs=1)
    trainer.fit(program.module, datamodule=program.data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(program.module, datamodule=program.data)


def fail(program: Program) -> None:
    try:
        fit(program)
    except ArithmeticError:
        return
    raise AssertionError(f"{program.job.fails} was to raise")


def save(program: Program) -> None:
    trainer = program.trainer(max_epochs=1)
    trainer.fit(program.module, datamodule=program.data)
    program.record.events.clear()
    trainer.save_checkpoint(program.place / "by_hand.ckpt")
    trainer.save_checkpoint(program.place / "weights.ckpt", weights_only=True)


def resume(program: Program, name: str) -> None:
    """An unbroken run, then one that goes on from its checkpoint `name`; between them stands `RESUMED`."""
    program.trainer(max_epochs=3).fit(program.module, datamodule=program.data)
    for file in program.place.glob("*.ckpt"):
        if file.name != name:
            file.unlink()  # as if the run had been killed after that save
    again = program.again()
    again.trainer(max_epochs=3).fit(again.module, datamodule=again.data, ckpt_path=str(program.place / name))
    program.record.events += [Event(RESUMED, name), *again.record.events]


def evaluate(program: Program, fn: str) -> None:
    fit(program)
    again = program.again()
    options = {} if fn == "predict" else {"verbose": False}
    path = str(program.place / "epoch=1-step=6.ckpt")
    getattr(again.trainer(), fn)(again.module, datamodule=again.data, ckpt_path=path, **options)
    program.record = again.record


SCENARIOS: dict[str, tuple[Job, Callable[[Program], None]]] = {
    "fit": (Job(), fit),
    "fit, data in the module": (Job(data=False, sharded=True), fit),
    "fit, streamed": (Job(streamed=True), fit),
    "fit, unequal accumulation": (Job(batches=5), fit),
    "fit, several validation loaders": (Job(held_loaders=2), fit),
    "fit, loaders asked for again": (Job(trainer={"reload_dataloaders_every_n_epochs": 1}), fit),
    "fit, no validation": (Job(manual=True, trainer={"limit_val_batches": 0}), fit),
    "fit, validating across epochs": (Job(trainer={"check_val_every_n_epoch": None, "val_check_interval": 4}), fit),
    "fit, by steps": (Job(trainer={"max_steps": 5, "max_epochs": -1}), fit),
    "fit, stopping": (Job(stop_at=4), fit),
    "fit, skipping": (Job(skip_at=4), fit),
    "fit, without a loss": (Job(empty_at=2), fit),
    "fit, fast": (Job(trainer={"fast_dev_run": 2}), fit),
    "fit, keeping the last": (Job(saves={"every_n_train_steps": 2, "save_top_k": -1, "save_last": True}), fit),
    "fit, saving at validation": (Job(saves=AT_VALIDATION), fit),
    "fit, saving at an epoch's end": (Job(saves=AT_EPOCHS_END, trainer=BY_EPOCH), fit),
    "fit twice": (Job(), fit_twice),
    "fit by hand": (Job(manual=True), fit),
    "fit by hand, validating late": (
        Job(manual=True, trainer={**BY_EPOCH, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 0}),
        fit,
    ),
    "fit, failing": (Job(fails="training_step"), fail),
    "fit, failing in validation": (Job(fails="validation_step"), fail),
    "save": (Job(), save),
    "resume midway": (Job(), partial(resume, name="epoch=0-step=2.ckpt")),
    "resume at the last batch": (Job(), partial(resume, name="epoch=1-step=6.ckpt")),
    "resume from a validation": (Job(saves=AT_VALIDATION), partial(resume, name="epoch=1-step=5.ckpt")),
    "resume from an epoch's end": (Job(saves=AT_EPOCHS_END), partial(resume, name="epoch=1-step=6.ckpt")),
    "validate": (Job(), partial(evaluate, fn="validate")),
    "test": (Job(), partial(evaluate, fn="test")),
    "test, data in the module": (Job(data=False), partial(evaluate, fn="test")),
    "predict": (Job(), partial(evaluate, fn="predict")),
    "predict, data in the module": (Job(data=False), partial(evaluate, fn="predict")),
}


def run(side: Any, scenario: str, place: Path) -> list[Event]:
    """The events of `scenario` on `side`, with files in `place`."""
    job, act = SCENARIOS[scenario]
    program = Program(side, place, job)
    act(program)
    return program.record.events
