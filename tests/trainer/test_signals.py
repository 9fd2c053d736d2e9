"""Signals: the save at the next step boundary, exact resuming from it, requeueing, and what ends a process at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_exact_resume import Net, Points, everything, loader
from torch.utils.data import DataLoader

from milepost import Trainer
from milepost.callbacks import Callback, ModelCheckpoint
from milepost.errors import MisconfigurationException, SIGTERMException
from milepost.loggers import CSVLogger
from milepost.plugins import Preemption
from milepost.plugins.environments import SLURMEnvironment


class Send(Callback):
    """Sends this process a signal, once, in a hook of its `nth` call."""

    def __init__(self, number: int, hook: str, nth: int) -> None:
        self.number, self.hook, self.left = number, hook, nth

    def _reach(self, trainer: Trainer, hook: str) -> None:
        if hook == self.hook and not trainer.sanity_checking:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._reach(trainer, "train")

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._reach(trainer, "validation")


class Guessing(Net):
    """Draws random numbers in validation too."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]) + torch.rand(()))


def fit(folder: Path, *callbacks: Any, ckpt_path: str | None = None, **arguments: Any) -> tuple[Trainer, Net]:
    torch.manual_seed(5 if ckpt_path is None else 6)
    net = Guessing()
    trainer = Trainer(
        max_epochs=3, accumulate_grad_batches=3, val_check_interval=4, logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
        **{"enable_checkpointing": bool(callbacks), **arguments},
    )  # fmt: skip
    trainer.fit(net, loader("shuffle", 0, True), DataLoader(Points(False), batch_size=8), ckpt_path=ckpt_path)
    return trainer, net


def keep_none(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder / "own", every_n_epochs=0)


@pytest.mark.parametrize(
    ("number", "hook", "nth", "plugins"),
    [
        (signal.SIGTERM, "train", 10, []),
        (signal.SIGUSR1, "train", 12, []),
        (signal.SIGHUP, "train", 17, [Preemption(signals=[signal.SIGHUP])]),
        (signal.SIGTERM, "validation", 5, []),
    ],
)
def test_stops_at_the_next_boundary_and_goes_on_bit_for_bit(
    tmp_path: Path, number: int, hook: str, nth: int, plugins: list[Any]
) -> None:
    expected = [t.clone() for t in everything(*fit(tmp_path / "whole"))]
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)]
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Send(number, hook, nth), keep_none(tmp_path), plugins=plugins)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)] == before
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("hpc*")] == ["own/hpc_ckpt_local_1.ckpt"]
    found = everything(*fit(tmp_path, keep_none(tmp_path), ckpt_path="auto"))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_runs_in_one_directory_do_not_go_on_from_each_others_stops(tmp_path: Path) -> None:
    def stopped(run: str) -> None:
        with pytest.raises(SIGTERMException):
            fit(tmp_path, Send(signal.SIGTERM, "train", 3), keep_none(tmp_path / run))

    stopped("one")
    stopped("other")
    for run, left in (("one", ["hpc_ckpt_local_1.ckpt"]), ("other", ["hpc_ckpt_local_1.ckpt"]), ("third", [])):
        trainer, _ = fit(tmp_path, keep_none(tmp_path / run), ckpt_path="auto")
        assert ([str(trainer.ckpt_path)] if trainer.ckpt_path else []) == [
            str(tmp_path / run / "own" / name) for name in left
        ]


def test_a_new_version_of_the_logger_goes_on_from_what_a_stop_left(tmp_path: Path) -> None:
    def run(*callbacks: Any, ckpt_path: str | None = None) -> Trainer:
        trainer = Trainer(
            max_epochs=2, logger=CSVLogger(tmp_path), enable_progress_bar=False, enable_model_summary=False,
            callbacks=list(callbacks), default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(Net(), loader("shuffle", 0, False), DataLoader(Points(False), batch_size=8), ckpt_path=ckpt_path)
        return trainer

    with pytest.raises(SIGTERMException):
        run(Send(signal.SIGTERM, "train", 3))
    (left,) = tmp_path.rglob("hpc_ckpt_local_1.ckpt")
    assert left.parent == tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    with pytest.warns(UserWarning, match="newest of the earlier versions"):
        assert run(ckpt_path="hpc").ckpt_path == str(left)


def test_a_trainer_that_saves_nothing_saves_nothing_for_a_signal(tmp_path: Path) -> None:
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Send(signal.SIGTERM, "train", 2), enable_checkpointing=False)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM job with a `scontrol` that notes what it was asked."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    asked = tmp_path / "asked"
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    return asked


def test_slurm_queues_the_job_again_and_old_files_go(tmp_path: Path, slurm: Path) -> None:
    folder = tmp_path / "run"
    (folder / "other").mkdir(parents=True)
    foreign = folder / "hpc_ckpt_99_7.ckpt"
    foreign.write_bytes(b"of another job")
    for round_, kept in enumerate([[1], [1, 2], [2, 3]], start=1):
        with pytest.raises(SIGTERMException):
            fit(folder, Send(signal.SIGUSR1, "train", 3), keep_none(folder))
        assert slurm.read_text().splitlines() == ["requeue 1234"] * round_
        assert sorted(p.name for p in folder.glob("hpc_ckpt_1234_*")) == [f"hpc_ckpt_1234_{n}.ckpt" for n in kept]
    assert foreign.read_bytes() == b"of another job"


def test_a_cancelled_job_is_saved_and_not_queued_again(tmp_path: Path, slurm: Path) -> None:
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Send(signal.SIGTERM, "train", 3), keep_none(tmp_path))
    assert (tmp_path / "hpc_ckpt_1234_1.ckpt").exists() and not slurm.exists()


def test_requeueing_can_be_turned_off(tmp_path: Path, slurm: Path) -> None:
    for plugin in (Preemption(requeue=False), SLURMEnvironment(auto_requeue=False)):
        with pytest.raises(SIGTERMException):
            fit(tmp_path, Send(signal.SIGUSR1, "train", 3), keep_none(tmp_path), plugins=[plugin])
    assert not slurm.exists()


def test_a_refused_requeue_is_told(tmp_path: Path, slurm: Path) -> None:
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho no such job >&2\nexit 3\n")
    with pytest.warns(UserWarning, match="status 3: no such job"), pytest.raises(SIGTERMException):
        fit(tmp_path, Send(signal.SIGUSR1, "train", 3), keep_none(tmp_path))
    assert (tmp_path / "hpc_ckpt_1234_1.ckpt").exists()


def test_evaluation_stops_between_batches(tmp_path: Path) -> None:
    trainer = Trainer(
        logger=False, enable_progress_bar=False, callbacks=[Send(signal.SIGTERM, "validation", 1)],
        default_root_dir=tmp_path, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(SIGTERMException):
        trainer.validate(Net(), DataLoader(Points(False), batch_size=8), verbose=False)
    assert not list(tmp_path.rglob("hpc*"))


def run(folder: Path, what: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(Path(__file__).parent / "signalled_run.py"), str(folder), what],
        env=environment, capture_output=True, text=True, check=False, start_new_session=True, timeout=60,
    )  # fmt: skip


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    done = run(tmp_path, "twice")
    assert done.returncode == -signal.SIGTERM and "sent" in done.stdout
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_signal_to_the_whole_group_with_workers_is_saved_all_the_same(tmp_path: Path) -> None:
    done = run(tmp_path, "group")
    assert (tmp_path / "hpc_ckpt_local_1.ckpt").exists(), done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 128 + signal.SIGTERM


def test_a_hung_step_says_where_it_hangs_when_the_grace_is_over(tmp_path: Path) -> None:
    done = run(tmp_path, "hang")
    assert done.returncode == 1
    assert "wait_for_what_never_comes" in done.stderr


@pytest.mark.parametrize("signals", [[signal.SIGKILL], [4242]])
def test_signals_that_cannot_be_caught_are_refused(signals: list[int]) -> None:
    with pytest.raises(MisconfigurationException, match="not a signal that a process can catch"):
        Preemption(signals=signals)


def test_two_preemptions_and_a_grace_of_nothing_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="2 values for Preemption"):
        Trainer(plugins=[Preemption(), Preemption()])
    with pytest.raises(MisconfigurationException, match="grace_seconds=0"):
        Preemption(grace_seconds=0)
