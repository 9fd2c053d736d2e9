"""Old layouts become the present one: beside Lightning's own migration, and where ours goes beyond it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from milepost.errors import ResumeError
from milepost.trainer.migration import CONTRACT_VERSION, VERSION_KEY, migrate_checkpoint, require_loops, watched_values

FILES = Path(__file__).parents[1] / "compat/old_lightning"
OLD = sorted(FILES.glob("*.ckpt"))


def counts(done: int) -> dict[str, Any]:
    return {span: dict.fromkeys(("ready", "completed"), done) for span in ("total", "current")}


def old(version: str = "1.6.0", **more: Any) -> dict[str, Any]:
    """A checkpoint as Lightning 1.6 lays it out, reduced to what the migration touches."""
    evaluation = {"state_dict": {}, "dataloader_progress": counts(0), "epoch_loop.state_dict": {}}
    return {
        "epoch": 1,
        "global_step": 12,
        VERSION_KEY: version,
        "state_dict": {},
        "loops": {
            "fit_loop": {
                "state_dict": {},
                "epoch_loop.state_dict": {},
                "epoch_loop.batch_loop.state_dict": {},
                "epoch_loop.batch_loop.optimizer_loop.state_dict": {},
                "epoch_loop.batch_loop.optimizer_loop.optim_progress": {
                    "optimizer": {"step": counts(12), "zero_grad": counts(12)},
                    "optimizer_position": 1,
                },
                "epoch_loop.batch_loop.manual_loop.state_dict": {},
                "epoch_loop.batch_loop.manual_loop.optim_step_progress": counts(0),
                "epoch_loop.val_loop.state_dict": {},
                "epoch_loop.val_loop.dataloader_progress": counts(1),
                "epoch_loop.val_loop.epoch_loop.state_dict": {},
                "epoch_loop.val_loop.epoch_loop.batch_progress": {**counts(6), "is_last_batch": True},
            },
            "validate_loop": copy.deepcopy(evaluation),
            "predict_loop": copy.deepcopy(evaluation),
        },
        **more,
    }


def lightnings(checkpoint: dict[str, Any]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        migration = pytest.importorskip("pytorch_lightning.utilities.migration")
        migrated: dict[str, Any] = migration.migrate_checkpoint(copy.deepcopy(checkpoint))[0]
    return migrated


def without_validation(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Lightning leaves the loop of validation inside fit as it was, and loses its counts."""
    loop = checkpoint["loops"]["fit_loop"]
    for key in [k for k in loop if k.startswith("epoch_loop.val_loop.")]:
        del loop[key]
    return checkpoint


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    return bool(left == right)


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_every_file_of_an_old_version_becomes_what_lightning_makes_of_it(path: Path) -> None:
    raw = torch.load(path, weights_only=True)
    expected = lightnings(raw)
    ours = migrate_checkpoint(copy.deepcopy(raw))
    if path.stem.endswith("several"):  # ours goes on counting its steps, see below
        manual = "epoch_loop.manual_optimization.optim_step_progress"
        ours["loops"]["fit_loop"][manual] = expected["loops"]["fit_loop"][manual]
    assert equal(without_validation(ours), without_validation(expected))
    assert ours["legacy_pytorch-lightning_version"] == path.stem.split("-")[0]
    assert ours[VERSION_KEY] == CONTRACT_VERSION


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"callbacks": {"ModelCheckpoint{'monitor': None, 'save_on_train_epoch_end': True}": {"dirpath": "a"}}},
        {"callbacks": {"ModelCheckpoint{'monitor': 'x', 'save_on_train_epoch_end': None}": {}, "Mine": {"n": 1}}},
    ],
    ids=["bare", "checkpointer", "two callbacks"],
)
def test_a_layout_of_1_6_becomes_what_lightning_makes_of_it(more: dict[str, Any]) -> None:
    raw = old(**more)
    assert equal(without_validation(migrate_checkpoint(copy.deepcopy(raw))), without_validation(lightnings(raw)))


def test_an_apex_state_is_dropped_with_a_warning() -> None:
    raw = old(amp_scaling_state={"loss_scaler0": {}})
    with pytest.warns(UserWarning, match="apex.*precision='16-mixed'"):
        migrated = migrate_checkpoint(copy.deepcopy(raw))
    assert "amp_scaling_state" not in migrated
    assert equal(without_validation(migrated), without_validation(lightnings(raw)))


def test_validation_inside_fit_keeps_its_counts() -> None:
    loop = migrate_checkpoint(old())["loops"]["fit_loop"]
    assert loop["epoch_loop.val_loop.batch_progress"] == {**counts(6), "is_last_batch": True}
    assert not [key for key in loop if "dataloader_progress" in key or "val_loop.epoch_loop" in key]


@pytest.mark.parametrize("name", ["NativeMixedPrecisionPlugin", "MixedPrecisionPlugin", "native_amp_scaling_state"])
def test_the_scaler_is_found_under_its_old_names(name: str) -> None:
    migrated = migrate_checkpoint(old(**{name: {"scale": 4.0}}))
    assert migrated["MixedPrecision"] == {"scale": 4.0}
    assert name not in migrated


def test_two_checkpointers_that_differed_in_a_dropped_argument_both_keep_their_state() -> None:
    keys = [f"ModelCheckpoint{{'monitor': 'x', 'save_on_train_epoch_end': {value}}}" for value in (True, False)]
    migrated = migrate_checkpoint(old(callbacks={keys[0]: {"n": 0}, keys[1]: {"n": 1}}))
    assert migrated["callbacks"] == {
        "ModelCheckpoint{'monitor': 'x'}": {"n": 0},
        "ModelCheckpoint{'monitor': 'x'}#2": {"n": 1},
    }


def test_steps_of_several_automatic_optimizers_are_counted_as_manual_ones() -> None:
    loop = migrate_checkpoint(old(optimizer_states=[{}, {}]))["loops"]["fit_loop"]
    assert loop["epoch_loop.manual_optimization.optim_step_progress"] == counts(12)


def test_the_state_of_a_users_own_batch_loop_is_kept() -> None:
    raw = old()
    raw["loops"]["fit_loop"]["epoch_loop.batch_loop.state_dict"] = {"mine": 3}
    migrated = migrate_checkpoint(copy.deepcopy(raw))
    assert migrated["loops"]["fit_loop"]["epoch_loop.state_dict"]["old_batch_loop_state_dict"] == {"mine": 3}
    assert equal(without_validation(migrated), without_validation(lightnings(raw)))


def test_release_candidates_of_2_0_are_understood() -> None:
    raw = old("2.0.0rc0")
    loop = raw["loops"]["fit_loop"]
    for key in [k for k in loop if ".batch_loop." in k]:
        loop[key.replace(".batch_loop.", ".")] = loop.pop(key)
    assert equal(migrate_checkpoint(raw)["loops"], migrate_checkpoint(old())["loops"])


def test_migrating_twice_changes_nothing_more() -> None:
    once = migrate_checkpoint(old(callbacks={"ModelCheckpoint{'monitor': None}": {}}))
    assert equal(migrate_checkpoint(copy.deepcopy(once)), once)


def test_a_newer_file_is_left_alone_with_a_warning() -> None:
    raw = old("3.1.0")
    with pytest.warns(UserWarning, match=r"Lightning 3\.1\.0, which is newer than the 2\.6\.6"):
        assert equal(migrate_checkpoint(copy.deepcopy(raw)), raw)


def test_a_dict_that_names_no_version_is_left_alone() -> None:
    assert migrate_checkpoint({"state_dict": {}}) == {"state_dict": {}}


def test_a_file_without_loops_says_what_to_do() -> None:
    raw = old("1.4.9")
    del raw["loops"]
    with pytest.raises(ResumeError, match=r"Lightning 1\.4\.9.*upgrade_checkpoint"):
        require_loops(migrate_checkpoint(raw))


SCORE = torch.tensor(0.25)


@pytest.mark.parametrize(
    ("callbacks", "expected"),
    [
        ({"ModelCheckpoint{}": {"monitor": "x", "best_k_models": {"/a/here.ckpt": SCORE}}}, {"x": SCORE}),
        ({"ModelCheckpoint{}": {"monitor": "x", "best_k_models": {"/a/e=1-step=12.ckpt": SCORE}}}, {"x": SCORE}),
        ({"ModelCheckpoint{}": {"monitor": "x", "best_k_models": {"/a/e=1-step=1.ckpt": SCORE}}}, {}),
        ({"ModelCheckpoint{}": {"monitor": None, "best_k_models": {}}}, {}),
        ({"EarlyStopping{'monitor': 'x', 'mode': 'min'}": {"wait_count": 0, "best_score": SCORE}}, {"x": SCORE}),
        ({"EarlyStopping{'monitor': 'x', 'mode': 'min'}": {"wait_count": 1, "best_score": SCORE}}, {}),
        ({"EarlyStopping{'monitor': 'x'}": {"wait_count": 0, "best_score": torch.tensor(torch.inf)}}, {}),
        ({"Mine": 3}, {}),
        (None, {}),
    ],
)
def test_a_watched_value_is_known_only_where_it_is_of_this_file(callbacks: Any, expected: Any) -> None:
    assert watched_values(old(callbacks=callbacks), "/elsewhere/here.ckpt") == expected
