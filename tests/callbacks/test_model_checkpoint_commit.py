"""What counts before, at and after the commit of a save whose plugin writes in its own time."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from line_run import fit_line, names, read

from milepost.callbacks import Callback, ModelCheckpoint


class Slow:
    """A plugin (three methods, no base class) whose saves end when `release` says so, oldest first."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[None], dict[str, Any], str]] = []
        self.automatic = False
        self.saves: list[str] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> Future[None]:
        future: Future[None] = Future()
        self.saves.append(Path(path).name)
        self.waiting.append((future, checkpoint, str(path)))
        if self.automatic:
            self.release()
        return future

    def release(self, error: Exception | None = None) -> None:
        while self.waiting:
            future, checkpoint, path = self.waiting.pop(0)
            if error is not None:
                future.set_exception(error)
            else:
                torch.save(checkpoint, path)
                future.set_result(None)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink()


class At(Callback):
    """Calls a function at the start of given batches."""

    def __init__(self, **actions: Any) -> None:
        self.actions = actions

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        action = self.actions.get(f"step{trainer.global_step}")
        if action is not None:
            action()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if "end" in self.actions:
            self.actions["end"]()


def test_memory_and_retention_change_at_commit(tmp_path: Path) -> None:
    plugin = Slow()
    checkpointer = ModelCheckpoint(tmp_path / "c", "{step}", every_n_train_steps=1)
    seen: dict[int, str] = {}

    def look(step: int) -> Any:
        return lambda: seen.setdefault(step, checkpointer.best_model_path)

    at = At(step1=look(1), step2=plugin.release, step3=look(3), end=lambda: setattr(plugin, "automatic", True))
    at.actions["end"] = lambda: (plugin.release(), setattr(plugin, "automatic", True))
    fit_line(tmp_path, at, checkpointer, plugins=plugin)
    assert seen[1] == "", "a save that is on its way counts nowhere"
    assert Path(seen[3]).name == "step=2.ckpt"
    assert names(tmp_path / "c") == {"step=4.ckpt"}


def test_the_state_in_a_file_lists_the_file_and_not_what_its_commit_deletes(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val", save_last=True)
    fit_line(tmp_path, checkpointer, max_epochs=2, values=[0.5, 0.4])
    state = read(tmp_path / "c" / "epoch=1.ckpt")["callbacks"][checkpointer.state_key]
    assert [Path(p).name for p in state["best_k_models"]] == ["epoch=1.ckpt"]
    assert Path(state["best_model_path"]).name == "epoch=1.ckpt"
    assert Path(state["last_model_path"]).name == "last.ckpt"
    assert state["milepost"]["entries"][0]["path"] == "epoch=1.ckpt"


def test_a_failed_save_raises_and_is_rolled_back(tmp_path: Path) -> None:
    plugin = Slow()
    checkpointer = ModelCheckpoint(tmp_path / "c", "{step}", every_n_train_steps=2)

    def fail() -> None:
        plugin.release(OSError(28, "No space left on device"))

    with pytest.raises(OSError, match="No space left"):
        fit_line(tmp_path, At(step2=plugin.release, step3=plugin.release, end=fail), checkpointer, plugins=plugin)
    assert names(tmp_path / "c") == {"step=2.ckpt"}
    assert Path(checkpointer.best_model_path).name == "step=2.ckpt"
    assert checkpointer.state_dict()["best_model_path"] == checkpointer.best_model_path


def test_a_plugin_without_link_saves_twice_and_the_default_once(tmp_path: Path) -> None:
    plugin = Slow()
    plugin.automatic = True
    fit_line(tmp_path, ModelCheckpoint(tmp_path / "c", "{epoch}", save_last=True), plugins=plugin)
    assert plugin.saves == ["epoch=0.ckpt", "last.ckpt"]
    fit_line(tmp_path, ModelCheckpoint(tmp_path / "d", "{epoch}", save_last=True))
    best, last = tmp_path / "d" / "epoch=0.ckpt", tmp_path / "d" / "last.ckpt"
    assert best.samefile(last), "one serialisation under two names"


def test_loggers_hear_of_commits_only(tmp_path: Path) -> None:
    from milepost.loggers import CSVLogger

    plugin = Slow()
    heard: list[str] = []

    class Listening(CSVLogger):
        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            heard.append(Path(checkpoint_callback.best_model_path).name)

    checkpointer = ModelCheckpoint(tmp_path / "c", "{step}", every_n_train_steps=2, save_top_k=-1)
    counts: list[int] = []
    at = At(step3=lambda: counts.append(len(heard)), end=plugin.release)
    fit_line(tmp_path, at, checkpointer, plugins=plugin, logger=Listening(tmp_path / "logs"))
    assert counts == [0]
    assert heard == ["step=2.ckpt", "step=4.ckpt"]


def test_a_file_in_the_way_of_deletion_is_a_warning(tmp_path: Path) -> None:
    class Stuck(Slow):
        def remove_checkpoint(self, path: Any) -> None:
            raise PermissionError(13, "Permission denied", str(path))

    plugin = Stuck()
    plugin.automatic = True
    with pytest.warns(UserWarning, match="could not be deleted"):
        fit_line(tmp_path, ModelCheckpoint(tmp_path / "c", "{epoch}"), plugins=plugin, max_epochs=2)


def _resume(root: Path, checkpointer: ModelCheckpoint, source: Path, **options: Any) -> None:
    fit_line(root, checkpointer, ckpt_path=str(source), **{"max_epochs": 4, **options})


def test_resuming_with_a_smaller_k_prunes(tmp_path: Path) -> None:
    three = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val", save_top_k=3, save_last=True)
    fit_line(tmp_path, three, max_epochs=3, values=[0.5, 0.3, 0.4])
    assert len(names(tmp_path / "c")) == 4
    one = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val", save_top_k=1, save_last=True)
    _resume(tmp_path, one, tmp_path / "c" / "last.ckpt", values=[0.9])
    assert names(tmp_path / "c") == {"epoch=1.ckpt", "last.ckpt"}
    assert one.best_model_score == pytest.approx(0.3)


def test_resuming_in_a_moved_directory_keeps_the_best_and_goes_on_pruning(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val", save_last=True)
    fit_line(tmp_path, first, max_epochs=3, values=[0.5, 0.3, 0.4])
    shutil.move(tmp_path / "c", tmp_path / "moved")
    second = ModelCheckpoint(tmp_path / "moved", "{epoch}", monitor="val", save_last=True)
    _resume(tmp_path, second, tmp_path / "moved" / "last.ckpt", values=[0.2])
    assert names(tmp_path / "moved") == {"epoch=3.ckpt", "last.ckpt"}
    assert not (tmp_path / "c").exists()


def test_a_deleted_best_file_is_forgotten(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val", save_last=True)
    fit_line(tmp_path, first, max_epochs=3, values=[0.5, 0.1, 0.4])
    (tmp_path / "c" / "epoch=1.ckpt").unlink()
    second = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val", save_last=True)
    _resume(tmp_path, second, tmp_path / "c" / "last.ckpt", values=[0.7])
    assert names(tmp_path / "c") == {"epoch=3.ckpt", "last.ckpt"}
    assert Path(second.best_model_path).name == "epoch=3.ckpt"


def test_what_was_resumed_from_and_what_lies_elsewhere_is_never_deleted(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val")
    fit_line(tmp_path, first, max_epochs=2, values=[0.5, 0.3])
    same = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val")
    _resume(tmp_path, same, tmp_path / "c" / "epoch=1.ckpt", max_epochs=3, values=[0.2])
    assert names(tmp_path / "c") == {"epoch=1.ckpt", "epoch=2.ckpt"}
    other = ModelCheckpoint(tmp_path / "d", "{epoch}", monitor="val")
    _resume(tmp_path, other, tmp_path / "c" / "epoch=2.ckpt", values=[0.25])
    assert names(tmp_path / "c") == {"epoch=1.ckpt", "epoch=2.ckpt"}
    assert names(tmp_path / "d") == {"epoch=3.ckpt"}, "the new directory has its own best"
    assert other.best_model_path.endswith("c/epoch=2.ckpt"), "which is not the best there is"


def test_two_checkpointers_that_differ_in_filename_only(tmp_path: Path) -> None:
    def pair() -> list[ModelCheckpoint]:
        return [ModelCheckpoint(tmp_path / "c", name, monitor="val") for name in ("a-{epoch}", "b-{epoch}")]

    fit_line(tmp_path, *pair(), max_epochs=1, values=[0.5])
    fit_line(tmp_path, *pair(), ckpt_path=str(tmp_path / "c" / "b-epoch=0.ckpt"), max_epochs=2, values=[0.4])
    assert names(tmp_path / "c") == {"a-epoch=1.ckpt", "b-epoch=1.ckpt", "b-epoch=0.ckpt"}


def test_lightnings_state_is_taken_up(tmp_path: Path) -> None:
    directory = (tmp_path / "c").resolve()
    directory.mkdir()
    for name in ("a.ckpt", "b.ckpt", "last.ckpt"):
        (directory / name).write_bytes(b"x")
    theirs = {
        "monitor": "val", "dirpath": str(directory), "current_score": torch.tensor(0.5),
        "best_model_score": torch.tensor(0.3), "best_model_path": str(directory / "b.ckpt"),
        "best_k_models": {str(directory / n): torch.tensor(s) for n, s in (("a.ckpt", 0.5), ("b.ckpt", 0.3))},
        "kth_best_model_path": str(directory / "a.ckpt"), "kth_value": torch.tensor(0.5),
        "last_model_path": str(directory / "last.ckpt"),
    }  # fmt: skip
    checkpointer = ModelCheckpoint(directory, monitor="val", save_top_k=2)
    checkpointer.load_state_dict(theirs)
    ours = checkpointer.state_dict()
    assert {k: ours[k] for k in theirs} == theirs


def test_a_damaged_file_is_passed_over_and_written_anew_under_its_name(tmp_path: Path) -> None:
    def checkpointer() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "c", "{step}", every_n_train_steps=2, save_top_k=-1)

    fit_line(tmp_path, checkpointer())
    torn = tmp_path / "c" / "step=4.ckpt"
    torn.write_bytes(torn.read_bytes()[:900])
    with pytest.warns(UserWarning, match=r"passing over the damaged checkpoint .*step=4\.ckpt"):
        fit_line(tmp_path, checkpointer(), ckpt_path="last")
    assert names(tmp_path / "c") == {"step=2.ckpt", "step=4.ckpt"}
    assert read(torn)["global_step"] == 4


def test_a_decision_that_waits_survives_an_interruption(tmp_path: Path) -> None:
    def checkpointer() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "c", "{step}-{val}", monitor="val", every_n_train_steps=3, save_last=True)

    with pytest.raises(RuntimeError, match="stopped"):
        fit_line(tmp_path, checkpointer(), stop_at=3)
    assert names(tmp_path / "c") == {"last.ckpt"}
    fit_line(tmp_path, checkpointer(), ckpt_path="last", values=[0.5])
    assert names(tmp_path / "c") == {"last.ckpt", "step=4-val=0.5.ckpt"}


def test_a_save_that_fails_in_the_background_ends_the_run_once(tmp_path: Path) -> None:
    from milepost.plugins import AsyncCheckpointIO, TorchCheckpointIO

    class Full(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> Any:
            if checkpoint["global_step"] == 8:
                raise OSError(28, "No space left on device", str(path))
            return super().save_checkpoint(checkpoint, path, storage_options)

    checkpointer = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val", save_on_exception=True)
    plugin = AsyncCheckpointIO(Full())
    with pytest.raises(OSError, match=r"epoch=1\.ckpt"):
        fit_line(tmp_path, checkpointer, plugins=plugin, max_epochs=2, values=[0.5, 0.4])
    assert "epoch=0.ckpt" in names(tmp_path / "c"), "nothing is deleted for a file that does not exist"
    assert Path(checkpointer.best_model_path).name == "epoch=0.ckpt"
    again = ModelCheckpoint(tmp_path / "d", "{epoch}")
    fit_line(tmp_path, again, plugins=plugin)
    assert names(tmp_path / "d") == {"epoch=0.ckpt"}, "the error does not come back in the next fit"


@pytest.mark.parametrize("top_k", [1, 2])
def test_with_the_asynchronous_plugin_exactly_the_kept_files_are_left(tmp_path: Path, top_k: int) -> None:
    from milepost.plugins import AsyncCheckpointIO

    checkpointer = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val", save_top_k=top_k, save_last=True)
    values = [0.9, 0.8, 0.7, 0.6, 0.5]
    fit_line(tmp_path, checkpointer, plugins=AsyncCheckpointIO(), max_epochs=5, values=values)
    kept = {f"epoch={n}.ckpt" for n in range(5 - top_k, 5)}
    assert names(tmp_path / "c") == {*kept, "last.ckpt"}
    assert {Path(p).name for p in checkpointer.best_k_models} == kept
    assert read(tmp_path / "c" / "last.ckpt")["global_step"] == 20


def test_pruning_what_the_last_links_to_keeps_the_last(tmp_path: Path) -> None:
    three = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val", save_top_k=3, save_last="link")
    fit_line(tmp_path, three, max_epochs=3, values=[0.5, 0.3, 0.4])
    last = tmp_path / "c" / "last.ckpt"
    assert last.is_symlink()
    shutil.copy(last, tmp_path / "copy.ckpt")
    one = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val", save_top_k=1, save_last="link")
    steps: list[int] = []
    look = At(step12=lambda: steps.append(read(last)["global_step"]))
    fit_line(tmp_path, look, one, ckpt_path=str(tmp_path / "copy.ckpt"), max_epochs=4, values=[0.9])
    assert steps == [12]
    assert names(tmp_path / "c") == {"epoch=1.ckpt", "last.ckpt"}


def test_a_plugin_that_does_nothing_ends_without_error(tmp_path: Path) -> None:
    class Nothing:
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None: ...
        def load_checkpoint(self, path: Any, storage_options: Any = None) -> Any: ...
        def remove_checkpoint(self, path: Any) -> None: ...

    checkpointer = ModelCheckpoint(tmp_path / "c", save_last=True)
    fit_line(tmp_path, checkpointer, plugins=Nothing(), max_epochs=3)
    assert Path(checkpointer.best_model_path).name == "epoch=2-step=12.ckpt", "a return is trusted as a success"


def test_a_failure_that_another_save_was_told_of_is_no_commit(tmp_path: Path) -> None:
    from milepost.plugins import AsyncCheckpointIO, TorchCheckpointIO

    class Once(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> Any:
            if Path(path).name == "a-2.ckpt":
                raise OSError(28, "No space left on device", str(path))
            return super().save_checkpoint(checkpoint, path, storage_options)

    arguments: dict[str, Any] = {"every_n_train_steps": 1, "save_top_k": -1, "on_save_error": "continue"}
    first, second = (
        ModelCheckpoint(tmp_path / "c", f"{letter}-{{step}}", auto_insert_metric_name=False, name=letter, **arguments)
        for letter in "ab"
    )
    with pytest.warns(UserWarning, match=r"NOT SAVED at step 2 \(1 failed so far\).*a-2\.ckpt") as warned:
        fit_line(tmp_path, first, second, plugins=AsyncCheckpointIO(Once()))
    assert len(warned) == 1 == first.failed_saves + second.failed_saves
    assert names(tmp_path / "c") == {"a-1.ckpt", "a-3.ckpt", "a-4.ckpt", *(f"b-{n}.ckpt" for n in range(1, 5))}
    listed = [entry["path"] for entry in first.state_dict()["milepost"]["entries"]]
    assert listed == ["a-1.ckpt", "a-3.ckpt", "a-4.ckpt"]


def test_named_checkpointers_find_their_state_in_any_order(tmp_path: Path) -> None:
    def named(letter: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / letter, "{step}", name=letter)

    fit_line(tmp_path, named("a"), named("b"))
    second, first = named("b"), named("a")
    fit_line(tmp_path, second, first, ckpt_path=str(tmp_path / "b" / "step=4.ckpt"), max_epochs=2)
    assert names(tmp_path / "a") == {"step=8.ckpt"}, "its own earlier file was retired"
    assert names(tmp_path / "b") == {"step=4.ckpt", "step=8.ckpt"}, "the source stays"


def test_a_run_that_died_between_a_commit_and_its_removal_leaves_nothing_for_good(tmp_path: Path) -> None:
    from milepost.plugins import TorchCheckpointIO

    class Dying(TorchCheckpointIO):
        def remove_checkpoint(self, path: Any) -> None:
            raise KeyboardInterrupt

    def checkpointer() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "c", "{step}", every_n_train_steps=2)

    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path, checkpointer(), plugins=Dying())
    assert names(tmp_path / "c") == {"step=2.ckpt", "step=4.ckpt"}
    (tmp_path / "c" / "other.ckpt").write_bytes(b"not ours")
    fit_line(tmp_path, checkpointer(), ckpt_path=str(tmp_path / "c" / "step=4.ckpt"), max_epochs=2)
    assert names(tmp_path / "c") == {"step=4.ckpt", "step=8.ckpt", "other.ckpt"}, "4 was resumed from"
