"""ModelCheckpoint on real runs: what is saved when, under which name, and what is kept."""

from __future__ import annotations

import inspect
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from line_run import Line, fit_line, loader, names, read

from milepost.callbacks import ModelCheckpoint
from milepost.errors import MisconfigurationException

lightning = pytest.importorskip("pytorch_lightning")


def test_arguments_defaults_and_constants_are_lightnings() -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint as Theirs

    ours, theirs = (inspect.signature(c).parameters for c in (ModelCheckpoint, Theirs))
    shared = {n: p.default for n, p in ours.items() if p.kind is not p.KEYWORD_ONLY}
    assert shared == {n: p.default for n, p in theirs.items()}
    assert list(shared) == list(theirs)
    assert set(ours) - set(theirs) == {"retention", "on_save_error", "name"}
    constants = [n for n in vars(Theirs) if n.isupper() and not n.startswith("_")]
    assert constants and {n: getattr(ModelCheckpoint, n) for n in constants} == {
        n: getattr(Theirs, n) for n in constants
    }
    for name in [n for n in vars(Theirs()) if not n.startswith("_")]:
        assert hasattr(ModelCheckpoint(), name), name


def test_methods_that_users_call_take_lightnings_arguments() -> None:
    from pytorch_lightning.callbacks import Callback as TheirCallback
    from pytorch_lightning.callbacks import ModelCheckpoint as Theirs

    public = [
        n for n, m in vars(Theirs).items() if not n.startswith("_") and n.islower() and n not in vars(TheirCallback)
    ]
    assert "format_checkpoint_name" in public and "to_yaml" in public
    for name in public:
        theirs, ours = getattr(Theirs, name), getattr(ModelCheckpoint, name)
        if callable(theirs):
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name


@pytest.mark.parametrize(
    "arguments",
    [{}, {"monitor": "val", "mode": "max", "every_n_train_steps": 7}, {"train_time_interval": timedelta(minutes=3)}],
)
def test_state_key_is_lightnings(arguments: dict[str, Any]) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint as Theirs

    assert ModelCheckpoint(**arguments).state_key == Theirs(**arguments).state_key


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"save_top_k": -2}, "save_top_k=-2"),
        ({"save_top_k": 2}, "pass monitor"),
        ({"mode": "best"}, "'min' or 'max'"),
        ({"every_n_train_steps": 2, "every_n_epochs": 1}, "exclude each other"),
        ({"every_n_epochs": -1}, "negative"),
    ],
)
def test_wrong_arguments_say_so(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        ModelCheckpoint(**arguments)


def test_default_saves_each_epoch_and_keeps_the_newest(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint()
    fit_line(tmp_path, checkpointer, max_epochs=2)
    assert checkpointer.dirpath == str((tmp_path / "checkpoints").resolve())
    assert names(tmp_path / "checkpoints") == {"epoch=1-step=8.ckpt"}
    assert checkpointer.best_model_path.endswith("epoch=1-step=8.ckpt")


def test_top_k_by_the_monitored_value(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "{epoch}-{val:.1f}", monitor="val", save_top_k=2)
    fit_line(tmp_path, checkpointer, max_epochs=5, values=[0.5, 0.9, 0.3, 0.3, 0.4])
    assert names(tmp_path / "c") == {"epoch=2-val=0.3.ckpt", "epoch=3-val=0.3.ckpt"}
    assert Path(checkpointer.best_model_path).name == "epoch=2-val=0.3.ckpt", "of a tie the earlier is the best"
    assert checkpointer.best_model_score == pytest.approx(0.3)
    assert Path(checkpointer.kth_best_model_path).name == "epoch=3-val=0.3.ckpt"
    assert checkpointer.kth_value == pytest.approx(0.3)
    assert checkpointer.current_score == pytest.approx(0.4)
    assert {Path(p).name for p in checkpointer.best_k_models} == names(tmp_path / "c")


def test_mode_max_and_keeping_all(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val", mode="max", save_top_k=-1)
    fit_line(tmp_path, checkpointer, max_epochs=3, values=[0.5, 0.9, 0.3])
    assert names(tmp_path / "c") == {"epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"}
    assert Path(checkpointer.best_model_path).name == "epoch=1.ckpt"


def test_a_tie_does_not_rewrite(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val")
    fit_line(tmp_path, checkpointer, max_epochs=3, values=[0.5, 0.5, 0.5])
    assert names(tmp_path / "c") == {"epoch=0.ckpt"}


def test_nan_is_never_best_unless_alone(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val")
    fit_line(tmp_path, checkpointer, max_epochs=3, values=[math.nan, 0.5, math.nan])
    assert names(tmp_path / "c") == {"epoch=1.ckpt"}
    alone = ModelCheckpoint(tmp_path / "d", "{epoch}", monitor="val")
    fit_line(tmp_path, alone, max_epochs=2, values=[math.nan, math.nan])
    assert names(tmp_path / "d") == {"epoch=1.ckpt"}


def test_a_constant_name_is_overwritten_by_the_better(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "best", monitor="val")
    fit_line(tmp_path, checkpointer, max_epochs=3, values=[0.5, 0.4, 0.6])
    assert names(tmp_path / "c") == {"best.ckpt"}
    assert read(tmp_path / "c" / "best.ckpt")["epoch"] == 1


def test_a_name_that_is_taken_gets_a_version(tmp_path: Path) -> None:
    two = ModelCheckpoint(tmp_path / "c", "same", monitor="val", save_top_k=2)
    fit_line(tmp_path, two, max_epochs=2, values=[0.5, 0.4])
    assert names(tmp_path / "c") == {"same.ckpt", "same-v1.ckpt"}
    over = ModelCheckpoint(tmp_path / "c", "same", enable_version_counter=False)
    fit_line(tmp_path, over, max_epochs=3)
    assert read(tmp_path / "c" / "same.ckpt")["epoch"] == 2


def test_step_trigger_saves_at_multiples(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "{step}", every_n_train_steps=3, save_top_k=-1)
    fit_line(tmp_path, checkpointer, max_epochs=2)
    assert names(tmp_path / "c") == {"step=3.ckpt", "step=6.ckpt"}
    assert read(tmp_path / "c" / "step=6.ckpt")["global_step"] == 6


def test_step_trigger_counts_optimizer_steps_under_accumulation(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "{step}", every_n_train_steps=1, save_top_k=-1)
    fit_line(tmp_path, checkpointer, accumulate_grad_batches=2)
    assert names(tmp_path / "c") == {"step=1.ckpt", "step=2.ckpt"}


def test_time_trigger(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "{step}", train_time_interval=timedelta(0), save_top_k=-1)
    fit_line(tmp_path, checkpointer)
    assert names(tmp_path / "c") == {f"step={n}.ckpt" for n in (1, 2, 3, 4)}
    never = ModelCheckpoint(tmp_path / "d", train_time_interval=timedelta(hours=1))
    fit_line(tmp_path, never)
    assert not (tmp_path / "d").exists()


def test_every_n_epochs_and_never(tmp_path: Path) -> None:
    fit_line(tmp_path, ModelCheckpoint(tmp_path / "c", "{epoch}", every_n_epochs=2, save_top_k=-1), max_epochs=4)
    assert names(tmp_path / "c") == {"epoch=1.ckpt", "epoch=3.ckpt"}
    fit_line(tmp_path, ModelCheckpoint(tmp_path / "d", every_n_epochs=0))
    assert not (tmp_path / "d").exists()


def test_save_on_train_epoch_end_or_validation_end(tmp_path: Path) -> None:
    auto = ModelCheckpoint(tmp_path / "c", "{step}", save_top_k=-1)
    fit_line(tmp_path, auto, val_check_interval=0.5)
    assert names(tmp_path / "c") == {"step=2.ckpt", "step=4.ckpt"}, "with validations inside the epoch, after each"
    forced = ModelCheckpoint(tmp_path / "d", "{step}", save_top_k=-1, save_on_train_epoch_end=True)
    fit_line(tmp_path, forced, val_check_interval=0.5)
    assert names(tmp_path / "d") == {"step=4.ckpt"}


def test_weights_only(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", save_weights_only=True)
    fit_line(tmp_path, checkpointer)
    checkpoint = read(checkpointer.best_model_path)
    assert "state_dict" in checkpoint and "optimizer_states" not in checkpoint


def test_save_last_is_the_newest_though_the_best_is_older(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val", save_last=True)
    fit_line(tmp_path, checkpointer, max_epochs=3, values=[0.1, 0.5, 0.6])
    assert names(tmp_path / "c") == {"epoch=0.ckpt", "last.ckpt"}
    assert read(tmp_path / "c" / "last.ckpt")["global_step"] == 12
    assert checkpointer.last_model_path == str((tmp_path / "c").resolve() / "last.ckpt")


def test_last_is_refreshed_when_the_run_ends_between_triggers(tmp_path: Path) -> None:
    fit_line(
        tmp_path,
        ModelCheckpoint(tmp_path / "c", "{step}", every_n_train_steps=3, save_last=True),
        max_steps=5,
        max_epochs=2,
    )
    assert read(tmp_path / "c" / "last.ckpt")["global_step"] == 5


def test_last_as_a_relative_link(tmp_path: Path) -> None:
    fit_line(tmp_path, ModelCheckpoint(tmp_path / "c", "{epoch}", save_last="link"), max_epochs=2)
    link = tmp_path / "c" / "last.ckpt"
    assert link.is_symlink() and str(link.readlink()) == "epoch=1.ckpt"


def test_a_link_gives_way_to_a_file_when_the_newest_is_not_among_the_best(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val", save_last="link")
    fit_line(tmp_path, checkpointer, max_epochs=2, values=[0.1, 0.5])
    assert not (tmp_path / "c" / "last.ckpt").is_symlink()
    assert read(tmp_path / "c" / "last.ckpt")["epoch"] == 1
    assert read(tmp_path / "c" / "epoch=0.ckpt")["epoch"] == 0, "nothing was written through the link"


def test_a_template_for_the_last_leaves_one_file(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", save_top_k=0, save_last=True)
    checkpointer.CHECKPOINT_NAME_LAST = "{epoch}-last"
    fit_line(tmp_path, checkpointer, max_epochs=3)
    assert names(tmp_path / "c") == {"epoch=2-last.ckpt"}


def test_a_foreign_last_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "last.ckpt").write_bytes(b"not ours")
    fit_line(tmp_path, ModelCheckpoint(tmp_path / "c", save_top_k=0, save_last=True), max_epochs=2)
    assert (tmp_path / "c" / "last.ckpt").read_bytes() == b"not ours"
    assert names(tmp_path / "c") == {"last.ckpt", "last-v1.ckpt"}


def test_unknown_key_in_the_filename_fails_at_the_first_save(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"'typo'.*epoch, step, train_loss, val, val/x"):
        fit_line(tmp_path, ModelCheckpoint(tmp_path / "c", "{epoch}-{typo}"))


def test_a_slash_in_a_metric_makes_no_directory(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "{val/x:.3f}", monitor="val/x")
    fit_line(tmp_path, checkpointer)
    (name,) = names(tmp_path / "c")
    assert name.startswith("val_x=") and name.endswith(".ckpt")


def test_nothing_is_saved_in_a_dev_run_or_by_validate(tmp_path: Path) -> None:
    trainer = fit_line(tmp_path, ModelCheckpoint(tmp_path / "c"), fast_dev_run=True, enable_checkpointing=True)
    trainer.validate(Line(), loader(), verbose=False)
    assert not (tmp_path / "c").exists()


def test_save_on_exception_keeps_the_state_and_the_error(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", save_on_exception=True, save_last=True)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit_line(tmp_path, checkpointer, stop_at=2)
    assert names(tmp_path / "c") == {"exception-epoch=0-step=2.ckpt", "last.ckpt"}
    fit_line(tmp_path, checkpointer)
    assert names(tmp_path / "c") == {"epoch=0-step=4.ckpt", "last.ckpt"}, "a newer save replaces the crash file"


def test_yaml_lists_the_best(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    checkpointer = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val", save_top_k=2)
    fit_line(tmp_path, checkpointer, max_epochs=2, values=[0.5, 0.25])
    checkpointer.to_yaml()
    listed = yaml.safe_load((tmp_path / "c" / "best_k_models.yaml").read_text())
    assert listed == {p: float(s) for p, s in checkpointer.best_k_models.items()}


def test_methods_that_users_call(tmp_path: Path) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "{epoch}-{val:.2f}", monitor="val")
    trainer = fit_line(tmp_path, checkpointer, values=[0.5])
    assert checkpointer.check_monitor_top_k(trainer, torch.tensor(0.4))
    assert not checkpointer.check_monitor_top_k(trainer, torch.tensor(0.6))
    assert not checkpointer.check_monitor_top_k(trainer, None)
    assert checkpointer.file_exists(checkpointer.best_model_path, trainer)
    assert not checkpointer.file_exists(tmp_path / "absent", trainer)
    name = checkpointer.format_checkpoint_name({"epoch": 1, "val": 0.123}, ver=3, prefix="p")
    assert Path(name).name == "p-epoch=1-val=0.12-v3.ckpt"
