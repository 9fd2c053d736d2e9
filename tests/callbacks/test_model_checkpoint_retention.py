"""Several reasons to keep a checkpoint at once; the index beside the files; loggers that hear of removals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from line_run import fit_line, names

from milepost.callbacks import KeepBest, KeepEvery, KeepNewest, ModelCheckpoint
from milepost.errors import CheckpointFormatError, MisconfigurationException
from milepost.loggers import CSVLogger
from milepost.plugins import AsyncCheckpointIO
from milepost.plugins.io.index import read_index


def test_best_newest_and_every_so_many_are_kept_together(tmp_path: Path) -> None:
    rule = KeepBest(1) | KeepNewest(2) | KeepEvery(12)
    checkpointer = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val", retention=rule)
    fit_line(tmp_path, checkpointer, max_epochs=8, values=[0.5, 0.1, 0.6, 0.5, 0.5, 0.5, 0.5, 0.7])
    best, every, newest = {"step=8.ckpt"}, {"step=12.ckpt", "step=24.ckpt"}, {"step=28.ckpt", "step=32.ckpt"}
    assert names(tmp_path / "c") == best | every | newest
    assert Path(checkpointer.best_model_path).name == "step=8.ckpt"
    assert [Path(path).name for path in checkpointer.best_k_models] == ["step=8.ckpt"]
    assert Path(checkpointer.kth_best_model_path).name == "step=8.ckpt"


def test_what_is_kept_for_its_age_does_not_wait_for_a_value(tmp_path: Path) -> None:
    rule = KeepBest(1) | KeepNewest(2)
    checkpointer = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val", every_n_train_steps=1, retention=rule)
    seen: list[set[str]] = []
    with pytest.raises(RuntimeError, match="stopped"):
        fit_line(tmp_path, checkpointer, stop_at=3)
    seen.append(names(tmp_path / "c"))
    assert seen == [{"step=2.ckpt", "step=3.ckpt"}]
    again = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val", every_n_train_steps=1, retention=rule)
    fit_line(tmp_path, again, ckpt_path="last", max_epochs=2, values=[0.3, 0.4])
    # Step 3 was resumed from, 4 is the best, 7 and 8 the newest. 8 was saved before its validation and again after it.
    assert names(tmp_path / "c") == {f"step={step}.ckpt" for step in (3, 4, 7, 8)}
    (record,) = [record for record in read_index(tmp_path / "c") if record["step"] == 8]
    assert record["score"] == pytest.approx(0.4)


def test_a_resumed_run_goes_on_with_the_policy_and_spares_its_source(tmp_path: Path) -> None:
    def checkpointer() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "c", "{step}", retention=KeepNewest(1) | KeepEvery(12))

    fit_line(tmp_path, checkpointer(), max_epochs=4)
    assert names(tmp_path / "c") == {"step=12.ckpt", "step=16.ckpt"}
    (tmp_path / "c" / "step=1.ckpt").write_bytes(b"not ours")
    fit_line(tmp_path, checkpointer(), max_epochs=7, ckpt_path=str(tmp_path / "c" / "step=16.ckpt"))
    assert names(tmp_path / "c") == {"step=1.ckpt", "step=12.ckpt", "step=16.ckpt", "step=24.ckpt", "step=28.ckpt"}


def test_two_ways_to_say_what_to_keep_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"save_top_k=3 and retention=.*KeepBest\(3\)"):
        ModelCheckpoint(monitor="val", save_top_k=3, retention=KeepNewest(2))


def test_loggers_hear_of_removals_after_the_commit_that_caused_them(tmp_path: Path) -> None:
    heard: list[str] = []

    class Listening(CSVLogger):
        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            heard.append(f"saved {Path(checkpoint_callback.best_model_path).name}")

        def after_remove_checkpoint(self, path: str) -> None:
            assert not Path(path).exists()
            heard.append(f"removed {Path(path).name}")

    fit_line(tmp_path, ModelCheckpoint(tmp_path / "c", "{epoch}"), max_epochs=2, logger=Listening(tmp_path / "logs"))
    assert heard == ["saved epoch=0.ckpt", "saved epoch=1.ckpt", "removed epoch=0.ckpt"]


def test_loggers_hear_of_what_a_resumed_run_prunes(tmp_path: Path) -> None:
    heard: list[str] = []

    class Listening(CSVLogger):
        def after_remove_checkpoint(self, path: str) -> None:
            heard.append(Path(path).name)

    three = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val", save_top_k=3)
    fit_line(tmp_path, three, max_epochs=3, values=[0.5, 0.3, 0.4])
    one = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val")
    source = str(tmp_path / "c" / "epoch=2.ckpt")
    fit_line(tmp_path, one, max_epochs=4, values=[0.9], ckpt_path=source, logger=Listening(tmp_path / "logs"))
    assert heard == ["epoch=0.ckpt"]
    assert names(tmp_path / "c") == {"epoch=1.ckpt", "epoch=2.ckpt"}
    assert [record["path"] for record in read_index(tmp_path / "c")] == ["epoch=1.ckpt", "epoch=2.ckpt"]


def test_a_logger_that_knows_nothing_of_removals_is_left_alone(tmp_path: Path) -> None:
    class Foreign(CSVLogger):
        after_remove_checkpoint = None  # type: ignore[assignment]

    fit_line(tmp_path, ModelCheckpoint(tmp_path / "c"), max_epochs=2, logger=Foreign(tmp_path / "logs"))
    assert len(names(tmp_path / "c")) == 1


@pytest.mark.parametrize("plugin", [None, AsyncCheckpointIO()])
def test_the_index_lists_what_there_is_without_opening_it(tmp_path: Path, plugin: Any) -> None:
    checkpointer = ModelCheckpoint(tmp_path / "c", "sub/{epoch}", monitor="val", save_top_k=2, save_last=True)
    fit_line(tmp_path, checkpointer, max_epochs=3, values=[0.5, 0.3, 0.4], plugins=plugin)
    records = read_index(tmp_path / "c")
    assert [(r["path"], r["kind"], r["step"], r["epoch"]) for r in records] == [
        ("sub/epoch=1.ckpt", "ranked", 8, 1),
        ("sub/epoch=2.ckpt", "ranked", 12, 2),
        ("last.ckpt", "last", 12, 2),
    ]
    assert [r["score"] for r in records] == pytest.approx([0.3, 0.4, 0.4])
    for record in records:
        file = tmp_path / "c" / record["path"]
        assert record["size_bytes"] == file.stat().st_size
        assert abs(record["time"] - file.stat().st_mtime) < 60
        assert record["monitor"] == "val" and set(record["metrics"]) == {"train_loss", "val", "val/x"}
    code = f"import json; print(len(json.load(open({str(tmp_path / 'c' / 'index.json')!r}))['checkpoints']))"
    listed = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert listed.stdout.strip() == "3", "plain JSON: no torch, no pickle"


def test_two_checkpointers_share_an_index(tmp_path: Path) -> None:
    fit_line(tmp_path, ModelCheckpoint(tmp_path / "c", "a-{epoch}"), ModelCheckpoint(tmp_path / "c", "b"), max_epochs=2)
    assert {record["path"] for record in read_index(tmp_path / "c")} == {"a-epoch=1.ckpt", "b.ckpt"}


def test_an_unusable_score_is_null_and_the_json_is_strict(tmp_path: Path) -> None:
    fit_line(tmp_path, ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val"), values=[float("nan")])
    content = (tmp_path / "c" / "index.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (record,) = json.loads(content, parse_constant=refuse)["checkpoints"]
    assert record["score"] is None and record["metrics"]["val"] is None


def test_an_index_that_is_torn_costs_no_checkpoint_and_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "index.json").write_text('{"version": 1, "check')
    with pytest.raises(CheckpointFormatError, match="Delete it"):
        read_index(tmp_path / "c")
    fit_line(tmp_path, ModelCheckpoint(tmp_path / "c", "a"))
    assert [record["path"] for record in read_index(tmp_path / "c")] == ["a.ckpt"]


def test_a_newer_index_is_refused_and_files_that_are_gone_are_not_listed(tmp_path: Path) -> None:
    fit_line(tmp_path, ModelCheckpoint(tmp_path / "c", "a"))
    (tmp_path / "c" / "a.ckpt").unlink()
    assert read_index(tmp_path / "c") == [] == read_index(tmp_path / "absent")
    (tmp_path / "c" / "index.json").write_text('{"version": 2, "checkpoints": []}')
    with pytest.raises(CheckpointFormatError, match="version 2"):
        read_index(tmp_path / "c")


def test_an_index_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "c" / "index.json").mkdir(parents=True)
    with pytest.warns(UserWarning, match="not up to date"):
        fit_line(tmp_path, ModelCheckpoint(tmp_path / "c", "a"))
    assert (tmp_path / "c" / "a.ckpt").exists()
