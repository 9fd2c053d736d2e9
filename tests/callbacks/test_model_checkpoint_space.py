"""A disk that is full, really: told before the first step, or trained on loudly until there is room again."""

from __future__ import annotations

import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from line_run import Line, fit_line, loader, names, read

from milepost import Trainer
from milepost.callbacks import Callback, ModelCheckpoint
from milepost.errors import CheckpointSaveError, MisconfigurationException
from milepost.plugins import AsyncCheckpointIO, SnapshotCheckpointIO, TorchCheckpointIO


class Disk:
    """A directory on a file system of 256 kB, or one where files can be limited to nothing."""

    def __init__(self, place: Path, mounted: bool) -> None:
        self.place = place
        self.mounted = mounted

    def fill(self) -> None:
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return
        with suppress(OSError), (self.place / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
        (self.place / "filler").unlink(missing_ok=True)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    yield Disk(place, mounted=True)
    subprocess.run(["umount", place], check=True)


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Disk]:
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    disk = Disk(tmp_path / "disk", mounted=False)
    disk.place.mkdir()
    yield disk
    disk.free()
    signal.signal(signal.SIGXFSZ, previous)


class Filling(Callback):
    """Fills the disk before the third step and frees it before the sixth; notes which checkpoints there are then."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.seen: set[str] = set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        trainer.checkpoint_callback.teardown(trainer, pl_module, "fit")  # waits until what is under way is committed
        if trainer.global_step == 2:
            self.disk.fill()
        elif trainer.global_step == 5:
            self.seen = {path.name for path in self.disk.place.glob("*.ckpt")}
            self.disk.free()


@pytest.mark.parametrize("kind", ["small", "limited"])
@pytest.mark.parametrize("make_io", [TorchCheckpointIO, AsyncCheckpointIO, SnapshotCheckpointIO])
def test_training_goes_on_while_the_disk_is_full_and_saves_once_there_is_room(
    kind: str, make_io: Callable[[], Any], request: pytest.FixtureRequest
) -> None:
    disk: Disk = request.getfixturevalue(kind)
    checkpointer = ModelCheckpoint(disk.place, "{step}", every_n_train_steps=1, on_save_error="continue")
    filling = Filling(disk)
    with pytest.warns(UserWarning, match="NOT SAVED at step") as warned:
        trainer = fit_line(disk.place.parent, filling, checkpointer, max_epochs=2, plugins=make_io())
    assert trainer.global_step == 8
    assert checkpointer.failed_saves == 3 == len(warned)
    for number, warning in enumerate(warned):
        text = str(warning.message)
        assert f"NOT SAVED at step {number + 3} ({number + 1} failed so far)" in text, text
        assert f"step={number + 3}.ckpt" in text
    assert filling.seen == {"step=2.ckpt"}, "the newest that was saved outlives the failures"
    assert names(disk.place) == {"step=8.ckpt"}
    assert make_io().load_checkpoint(disk.place / "step=8.ckpt")["global_step"] == 8
    assert Path(checkpointer.best_model_path).name == "step=8.ckpt"


def test_the_last_is_written_at_the_end_though_the_save_before_it_failed(limited: Disk) -> None:
    checkpointer = ModelCheckpoint(limited.place, save_top_k=0, save_last=True, on_save_error="continue")

    class FreeAtTheEnd(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            limited.fill()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            limited.free()

    with pytest.warns(UserWarning, match="NOT SAVED at step 4"):
        fit_line(limited.place.parent, FreeAtTheEnd(), checkpointer)
    assert read(limited.place / "last.ckpt")["global_step"] == 4


def test_the_count_goes_on_in_a_resumed_run(limited: Disk) -> None:
    first = ModelCheckpoint(limited.place, "{step}", every_n_train_steps=1, on_save_error="continue")
    with pytest.warns(UserWarning, match="NOT SAVED"):
        fit_line(limited.place.parent, Filling(limited), first, max_epochs=2)
    again = ModelCheckpoint(limited.place, "{step}", every_n_train_steps=1, on_save_error="continue")
    fit_line(limited.place.parent, again, max_epochs=3, ckpt_path="last")
    assert again.failed_saves == 3


def test_without_leave_to_go_on_a_full_disk_ends_the_run(limited: Disk) -> None:
    checkpointer = ModelCheckpoint(limited.place, "{step}", every_n_train_steps=1)
    with pytest.raises(CheckpointSaveError, match=r"step 3 .*step=3\.ckpt"):
        fit_line(limited.place.parent, Filling(limited), checkpointer, max_epochs=2)
    assert names(limited.place) == {"step=2.ckpt"}


class Large(Line):
    """`floats` numbers more."""

    def __init__(self, floats: int) -> None:
        super().__init__()
        self.register_buffer("more", torch.zeros(floats))
        self.steps = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.steps += 1


def _fit(module: Large, checkpointer: ModelCheckpoint) -> None:
    trainer = Trainer(
        accelerator="cpu", logger=False, max_epochs=1, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[checkpointer],
    )  # fmt: skip
    trainer.fit(module, loader())


def test_no_room_for_one_checkpoint_is_told_with_figures_before_the_first_step(small: Disk) -> None:
    module = Large(100_000)
    with pytest.raises(
        CheckpointSaveError, match=r"no room for a single.*262 kB free; a checkpoint takes about 400 kB"
    ):
        _fit(module, ModelCheckpoint(small.place))
    assert module.steps == 0 and names(small.place) == set()


def test_too_little_room_for_what_is_to_be_kept_is_a_warning(small: Disk) -> None:
    _fit(Large(20_000), ModelCheckpoint(small.place / "fits"))
    (small.place / "fits" / "epoch=0-step=4.ckpt").unlink()
    with pytest.warns(UserWarning, match=r"takes about 80 kB, and 4 are to be kept there"):
        _fit(Large(20_000), ModelCheckpoint(small.place / "c", monitor="train_loss", save_top_k=3))


def test_a_full_disk_is_told_before_the_first_step(small: Disk) -> None:
    small.fill()
    module = Large(1)
    with pytest.raises(CheckpointSaveError, match=r"cannot be written to .*No space left"):
        _fit(module, ModelCheckpoint(small.place / "c"))
    assert module.steps == 0
    with pytest.warns(UserWarning, match="Training goes on"), pytest.warns(UserWarning, match="NOT SAVED at step 4"):
        _fit(module, ModelCheckpoint(small.place / "c", on_save_error="continue"))
    assert module.steps == 4


def test_a_place_that_cannot_be_written_to_is_told_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    module = Large(1)
    with pytest.raises(CheckpointSaveError, match=r"cannot be written to .*file/c"):
        _fit(module, ModelCheckpoint(tmp_path / "file" / "c"))
    assert module.steps == 0 and names(tmp_path) == {"file"}


def test_a_plugin_that_does_not_say_is_not_asked(tmp_path: Path) -> None:
    class Elsewhere:
        def __init__(self) -> None:
            self.kept: dict[str, Any] = {}

        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            self.kept[str(path)] = checkpoint

        def load_checkpoint(self, path: Any, storage_options: Any = None) -> Any:
            return self.kept[str(path)]

        def remove_checkpoint(self, path: Any) -> None:
            del self.kept[str(path)]

    plugin = Elsewhere()
    fit_line(tmp_path, ModelCheckpoint("memory://x"), plugins=plugin)
    assert len(plugin.kept) == 1


def test_another_policy_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="'ignore'"):
        ModelCheckpoint(on_save_error="ignore")  # type: ignore[arg-type]
