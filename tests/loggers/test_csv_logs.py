"""CSVLogger: no row is ever lost, whatever was in the folder before."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from milepost.errors import MisconfigurationException
from milepost.loggers import CSVLogger


def rows(logger: CSVLogger) -> list[dict[str, str]]:
    with logger.metrics_file.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_and_folders(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="exp", prefix="p")
    logger.log_metrics({"loss": torch.tensor(0.5)}, step=3)
    logger.save()
    assert Path(logger.log_dir or "") == tmp_path / "exp" / "version_0"
    assert rows(logger) == [{"p-loss": "0.5", "step": "3"}]


def test_next_version_is_above_every_one_there(tmp_path: Path) -> None:
    (tmp_path / "lightning_logs" / "version_4").mkdir(parents=True)
    assert CSVLogger(tmp_path).version == 5


def test_resuming_a_version_appends_and_widens(tmp_path: Path) -> None:
    first = CSVLogger(tmp_path, version=0)
    first.log_metrics({"loss": 1.0}, step=0)
    first.finalize("failed")
    second = CSVLogger(tmp_path, version=0)
    second.log_metrics({"loss": 0.5}, step=1)
    second.save()
    second.log_metrics({"acc": 0.9}, step=2)
    second.finalize("success")
    assert [r["step"] for r in rows(second)] == ["0", "1", "2"]
    assert [r["loss"] for r in rows(second)] == ["1.0", "0.5", ""]
    assert [r["acc"] for r in rows(second)] == ["", "", "0.9"]


def test_flushes_by_count(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=2)
    logger.log_metrics({"a": 1.0}, step=0)
    assert not logger.metrics_file.exists()
    logger.log_metrics({"a": 1.0}, step=1)
    assert len(rows(logger)) == 2


def test_flushes_by_steps_where_few_of_them_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=100)
    logger.log_metrics({"a": 1.0}, step=49)
    assert not logger.metrics_file.exists()
    logger.log_metrics({"a": 1.0}, step=99)
    assert len(rows(logger)) == 2


def test_hyperparameters_are_readable_and_kept(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1})
    logger.log_hyperparams({"act": torch.relu})
    text = Path(logger.log_dir or "", "hparams.yaml").read_text()
    assert '"lr": 0.1' in text and "relu" in text


def test_a_flush_interval_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="0"):
        CSVLogger(tmp_path, flush_logs_every_n_steps=0)


def test_a_row_that_was_cut_off_does_not_swallow_the_next(tmp_path: Path) -> None:
    first = CSVLogger(tmp_path, version=0)
    first.log_metrics({"loss": 1.0}, step=10)
    first.save()
    first.metrics_file.write_bytes(first.metrics_file.read_bytes() + b"0.5")  # killed while it wrote a row
    second = CSVLogger(tmp_path, version=0)
    second.log_metrics({"loss": 0.25}, step=12)
    second.save()
    assert rows(second)[0] == {"loss": "1.0", "step": "10"} and rows(second)[-1] == {"loss": "0.25", "step": "12"}
