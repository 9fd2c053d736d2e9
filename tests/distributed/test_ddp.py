"""DDP on two real ranks: beside Lightning's, exact resume, plugins that know nothing of ranks, what ranks agree on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runs import QUIET, SAMPLES, Points, SaveAt, digest, fit, loaders, net_of

import milepost
from milepost.callbacks import Callback, EarlyStopping, ModelCheckpoint
from milepost.errors import MisconfigurationException, SIGTERMException
from milepost.loggers import Logger
from milepost.plugins import AsyncCheckpointIO, SnapshotCheckpointIO, TorchCheckpointIO
from milepost.strategies import DDPStrategy
from milepost.testing import run_ranks

HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(400)  # several processes, each of which imports torch


class Still(Points):
    """Points that are the same whenever they are read."""

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.x[index].sum(), index


class Recorder:
    """A CheckpointIO that derives from nothing and keeps the dicts in memory."""

    def __init__(self, failing: int = 0) -> None:
        self.kept: dict[str, Any] = {}
        self.calls: list[str] = []
        self.failing = failing

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.calls.append(Path(path).name)
        if len(self.calls) == self.failing:
            raise OSError("no room")
        torch.save(checkpoint, path)

    def load_checkpoint(self, path: Any, storage_options: Any = None) -> Any:
        return torch.load(path, weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        self.calls.append(f"-{Path(path).name}")
        Path(path).unlink()


class Untrue(Callback):
    """Ranks see other values of what is monitored: rank 1 would stop at once and finds every state worse."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        epoch = trainer.current_epoch
        pl_module.log("own", float(epoch if trainer.global_rank else -epoch))


def beside_lightning() -> dict[str, Any]:
    """The same run by both libraries: the order of the samples, the losses, the metrics, the weights."""
    import pytorch_lightning

    seen: dict[str, Any] = {}
    for name, library in (("milepost", milepost), ("lightning", pytorch_lightning)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library.seed_everything(3, verbose=False)
            net = net_of(library, dropout=0.0)()
            net_loaders = loaders()
            for loader in net_loaders:
                loader.dataset.__class__ = Still
            trainer = library.Trainer(
                accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, accumulate_grad_batches=2,
                enable_checkpointing=False, num_sanity_val_steps=0, **QUIET,
            )  # fmt: skip
            trainer.fit(net, *net_loaders)
        metrics = {key: value.item() for key, value in sorted(trainer.callback_metrics.items())}
        os.environ.pop("PL_GLOBAL_SEED")
        seen[name] = [net.samples, net.losses, metrics, [p.tolist() for p in net.parameters()]]
    return seen


def resumed(folder: Path) -> dict[str, Any]:
    """The unbroken run, and one from each checkpoint of it."""
    results: dict[str, Any] = {}
    trainer, net = fit(folder, SaveAt(folder, [2, 3, 4, 7]))
    results["whole"] = [net.losses, digest(trainer, net)]
    results["samples"] = net.samples
    for batch in (2, 3, 4, 7):
        trainer, net = fit(folder, seed=90, ckpt_path=folder / f"batch{batch}.ckpt")
        results[f"batch{batch}"] = [net.losses, digest(trainer, net)]
    io = {"plugins": SnapshotCheckpointIO()}
    fit(folder, SaveAt(folder / "snapshots", [3]), **io)
    trainer, net = fit(folder, seed=90, ckpt_path=folder / "snapshots" / "batch3.ckpt", **io)
    results["snapshot"] = [net.losses, digest(trainer, net)]
    _, net = fit(folder, max_epochs=1, ckpt_path=folder / "alone" / "batch3.ckpt")
    results["grown"] = net.samples
    return results


def plugins_and_decisions(folder: Path) -> dict[str, Any]:
    """What each rank asked of a plugin, and what it knows of the files in the end."""
    results: dict[str, Any] = {}
    io = Recorder()
    saver = ModelCheckpoint(dirpath=folder / "own", monitor="own", save_top_k=1, save_last=True)
    stop = EarlyStopping("own", patience=2, check_on_train_epoch_end=False)
    trainer, _ = fit(folder / "own", saver, stop, Untrue(), plugins=io, max_epochs=6)
    results["calls"], results["epochs"] = io.calls, trainer.current_epoch
    results["best"] = [
        Path(saver.best_model_path).name,
        saver.best_model_score.item(),
        Path(saver.last_model_path).name,
    ]
    trainer.validate(dataloaders=loaders()[1], ckpt_path="best", verbose=False)
    results["loaded"] = Path(trainer.ckpt_path).name
    failing = Recorder(failing=2)
    patient = ModelCheckpoint(dirpath=folder / "failing", save_top_k=-1, on_save_error="continue")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(folder, patient, plugins=failing)
    results["failed"] = [patient.failed_saves, sum("NOT SAVED" in str(w.message) for w in caught)]
    strict = ModelCheckpoint(dirpath=folder / "strict", save_top_k=-1)
    try:
        fit(folder, strict, plugins=Recorder(failing=2))
    except OSError as error:
        results["raised"] = str(error)
    results["left"] = sorted(path.name for path in (folder / "failing").iterdir())
    return results


class Full(Logger):
    """A disk that is full when the checkpointer has what was logged written, once."""

    full = False

    def save(self) -> None:
        if self.full:
            self.full = False
            raise OSError("no room to log")


class Fill(Callback):
    """Fills the disk after the second batch, before the checkpointer saves."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.logger.full = trainer.fit_loop.total_batch_idx == 1


def full_disk(folder: Path) -> dict[str, Any]:
    """A logger that cannot write when the checkpointer saves: what each rank is told, and where it ends."""
    results: dict[str, Any] = {}
    for name in ("raise", "continue"):
        saver = ModelCheckpoint(dirpath=folder / name, every_n_train_steps=1, save_top_k=-1, on_save_error=name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer, _ = fit(folder, Fill(), saver, logger=Full(), max_epochs=1)
            results[name] = [trainer.global_step, saver.failed_saves]
        except OSError as error:
            results[name] = "no room to log" in str(error)
    return results


class OnRankZero(Callback):
    """Logs a value on rank 0 alone, which never improves."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 0:
            pl_module.log("rare", 1.0)


def lacking(folder: Path) -> list[Any]:
    """EarlyStopping on what one rank has: whether it is refused on this rank, and the epoch where it stops."""
    with pytest.raises(MisconfigurationException, match="'rare', which is not logged") as caught:
        fit(folder, EarlyStopping("rare", check_on_train_epoch_end=False), OnRankZero())
    lenient = EarlyStopping("rare", patience=1, strict=False, check_on_train_epoch_end=False)
    trainer, _ = fit(folder, lenient, OnRankZero(), max_epochs=9)
    return ["on another rank" in str(caught.value), trainer.current_epoch]


class Late(TorchCheckpointIO):
    """Writes once the other rank has ended its run, or has not for a while."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline and not Path(path).with_name("ended").exists():
            pass
        super().save_checkpoint(checkpoint, path, storage_options)


def saved_in_background(folder: Path) -> bool:
    """Whether this rank, stopped by a signal, found what rank 0 writes in the background durable when it ended."""
    place = folder / "background"
    try:
        fit(place, ModelCheckpoint(dirpath=place, every_n_epochs=0), Signal(rank=1, batch=2, late=None),
            plugins=AsyncCheckpointIO(Late()))  # fmt: skip
    except SIGTERMException:
        found = (place / "hpc_ckpt_local_1.ckpt").exists()
        if dist.get_rank():
            (place / "ended").touch()
        return found
    return False


class Signal(Callback):
    """Sends one rank a signal inside a batch, and another one its first while they save, as a launcher may."""

    def __init__(self, rank: int, batch: int, late: int | None) -> None:
        self.rank, self.batch, self.late, self.stepping = rank, batch, late, False

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.stepping = True
        if (trainer.global_rank, trainer.fit_loop.total_batch_idx) == (self.rank, self.batch):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_save_checkpoint(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank == self.late and self.stepping:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped(folder: Path) -> dict[str, Any]:
    """A signal to rank 1 alone, and one to rank 0 while they save; the run that goes on from what they have saved."""
    results: dict[str, Any] = {}
    for name, late in (("one", None), ("both", 0)):
        place = folder / name
        saver = ModelCheckpoint(dirpath=place, every_n_epochs=0)
        try:
            fit(place, saver, Signal(rank=1, batch=2, late=late), max_epochs=50)
            status: Any = None
        except SIGTERMException as error:
            status = error.code
        trainer, net = fit(place, ModelCheckpoint(dirpath=place, every_n_epochs=0), seed=90, ckpt_path="hpc")
        results[name] = [status, [path.name for path in place.glob("*.ckpt")], len(net.losses), digest(trainer, net)]
    return results


def manual(folder: Path) -> Any:
    """Two optimizers, stepped by hand: the weights on this rank."""

    class Manual(net_of(milepost)):  # type: ignore[misc]
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                with optimizer.toggle_model():
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch))
                    optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.layers[n].parameters(), lr=0.1) for n in (0, 3)]

    _, net = fit(folder, net=Manual(), accumulate_grad_batches=1)
    return [p.tolist() for p in net.parameters()]


def uneven(folder: Path) -> Any:
    """Stepped by hand, where rank 1 uses the first layer alone: the weights on this rank."""

    class Uneven(net_of(milepost)):  # type: ignore[misc]
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.layers[0](batch[0]).square().mean() if self.global_rank else self.loss(batch))
            optimizer.step()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    _, net = fit(folder, net=Uneven(), accumulate_grad_batches=1)
    return [p.tolist() for p in net.parameters()]


class Thaw(Callback):
    """Trains all but the first layer until the middle of a step in the second epoch, then all but the last."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.layers[0].requires_grad_(False)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 1):  # the second of two that make a step
            pl_module.layers[0].requires_grad_(True)
            pl_module.layers[3].requires_grad_(False)


def thawed(folder: Path) -> Any:
    """The weights on this rank after layers were frozen and unfrozen in a fit."""
    _, net = fit(folder, Thaw())
    return [p.tolist() for p in net.parameters()]


def all_on_one_rank(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    results: dict[str, Any] = {"beside": beside_lightning(), "resumed": resumed(folder), "manual": manual(folder)}
    results["uneven"] = uneven(folder)
    results["thawed"] = thawed(folder)
    results["lacking"], results["full"] = lacking(folder), full_disk(folder / "full")
    results["background"] = saved_in_background(folder)
    results["stopped"] = stopped(folder)
    results.update(plugins_and_decisions(folder))
    results["rank"] = dist.get_rank()
    with pytest.raises(MisconfigurationException, match="destroy_process_group"):
        fit(folder, devices=1, strategy="auto")
    dist.destroy_process_group()
    if results["rank"] == 0:
        fit(folder, devices=1, strategy="auto", max_epochs=1)
    return results


def alone(folder: Path, *callbacks: Callback, **options: Any) -> list[int]:
    """The samples that one epoch reads on a single rank."""
    return list(fit(folder, *callbacks, devices=1, strategy="auto", max_epochs=1, **options)[1].samples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    seen = alone(folder, SaveAt(folder / "alone", [3]))
    (folder / "alone" / "seen.txt").write_text(str(seen[:9]))
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(all_on_one_rank, 2, folder)


def test_trains_as_lightnings_ddp_does(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        ours, theirs = rank["beside"]["milepost"], rank["beside"]["lightning"]
        assert ours[0] == theirs[0]
        assert ours[1] == theirs[1]
        assert ours[2] == pytest.approx(theirs[2], rel=1e-6)
        assert ours[3] == theirs[3]


def test_no_sample_is_seen_twice_but_for_padding(ranks: list[dict[str, Any]]) -> None:
    for epoch in range(3):
        each = SAMPLES // 2
        seen = [sample for rank in ranks for sample in rank["resumed"]["samples"][epoch * each : (epoch + 1) * each]]
        assert sorted(seen) == list(range(SAMPLES))


@pytest.mark.parametrize("batch", [2, 3, 4, 7])
def test_goes_on_bit_for_bit(ranks: list[dict[str, Any]], batch: int) -> None:
    for rank in ranks:
        losses, end = rank["resumed"]["whole"]
        assert rank["resumed"][f"batch{batch}"] == [losses[batch:], end]


def test_goes_on_bit_for_bit_from_what_every_rank_has_written(ranks: list[dict[str, Any]], folder: Path) -> None:
    for rank in ranks:
        losses, end = rank["resumed"]["whole"]
        assert rank["resumed"]["snapshot"] == [losses[3:], end]
    assert {path.name for path in (folder / "snapshots" / "batch3.ckpt").iterdir()} > {"tree-r00001.json"}


@pytest.mark.parametrize(("file", "io"), [("", TorchCheckpointIO), ("snapshots", SnapshotCheckpointIO)])
def test_fewer_ranks_read_what_is_left(ranks: list[dict[str, Any]], folder: Path, file: str, io: Any) -> None:
    """Saved inside accumulation, after three batches of three of each rank."""
    left = alone(folder, ckpt_path=folder / file / "batch3.ckpt", plugins=io())
    assert sorted(left + [sample for rank in ranks for sample in rank["resumed"]["samples"][:9]]) == list(
        range(SAMPLES)
    )


def test_more_ranks_read_what_is_left(ranks: list[dict[str, Any]], folder: Path) -> None:
    seen = json.loads((folder / "alone" / "seen.txt").read_text())
    left = [sample for rank in ranks for sample in rank["resumed"]["grown"]]
    extra = len(seen) + len(left) - SAMPLES
    assert extra == 1  # fifteen are left: one is padding
    assert set(seen + left) == set(range(SAMPLES)) and not set(seen) & set(left[:-1])


def test_rank_zero_alone_is_asked_to_save_and_to_delete(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["calls"] and not ranks[1]["calls"]


def test_all_ranks_decide_as_rank_zero_sees_it(ranks: list[dict[str, Any]]) -> None:
    for key in ("epochs", "best", "loaded"):
        assert ranks[0][key] == ranks[1][key]
    assert ranks[0]["best"][0] == ranks[0]["loaded"]
    assert ranks[0]["epochs"] == 3  # rank 1 saw no improvement in two checks after the first


def test_a_failed_save_is_one_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["failed"] == [1, 1]
        assert "no room" in rank["raised"]
        assert len([name for name in rank["left"] if name.endswith(".ckpt")]) == 2


def test_a_logger_that_cannot_write_fails_the_save_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["full"] == {"raise": True, "continue": [2, 1]}


def test_a_metric_that_one_rank_lacks_is_refused_or_passed_over_on_all(ranks: list[dict[str, Any]]) -> None:
    assert [rank["lacking"] for rank in ranks] == [[True, 2], [False, 2]]


def test_no_rank_ends_before_what_rank_zero_writes_is_durable(ranks: list[dict[str, Any]]) -> None:
    assert [rank["background"] for rank in ranks] == [True, True]


@pytest.mark.parametrize("name", ["one", "both"])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(ranks: list[dict[str, Any]], name: str) -> None:
    left = [rank["stopped"][name][2] for rank in ranks]
    assert left[0] == left[1] and 0 < left[0] < 10
    for rank in ranks:
        status, files, _, end = rank["stopped"][name]
        assert (status, files) == (128 + signal.SIGTERM, ["hpc_ckpt_local_1.ckpt"])
        assert end == rank["resumed"]["whole"][1]


def test_parameters_unfrozen_in_a_fit_are_averaged_too(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["thawed"] == ranks[1]["thawed"]


def test_manual_optimization_keeps_the_ranks_together(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["manual"] == ranks[1]["manual"]


def test_manual_optimization_averages_what_only_one_rank_has_used(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["uneven"] == ranks[1]["uneven"]


def test_a_script_starts_its_ranks_and_goes_on_when_one_is_killed(tmp_path: Path, ranks: list[dict[str, Any]]) -> None:
    """``python script.py``: nobody has started the ranks. Rank 1 is killed, torch's launcher starts both again."""
    environment = {**os.environ, "PET_MAX_RESTARTS": "1", "PYTHONPATH": str(HERE.parents[1] / "src")}
    environment.pop("PYTEST_CURRENT_TEST")
    done = subprocess.run(
        [sys.executable, str(HERE / "runs.py"), str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        end, resumed_from = (tmp_path / f"rank{rank}.txt").read_text().split()
        assert resumed_from == "last.ckpt"
        assert end == ranks[rank]["resumed"]["whole"][1]


def test_a_test_runner_is_not_started_again(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="run_ranks"):
        fit(tmp_path)


def test_one_device_is_refused_where_several_ranks_were_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milepost._distributed._joined", False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MisconfigurationException, match="same files"):
        milepost.Trainer(accelerator="cpu", devices=1, **QUIET)


def test_a_program_from_standard_input_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["-"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-"])
    with pytest.raises(MisconfigurationException, match="cannot be started again"):
        fit(tmp_path)


def test_a_launcher_that_the_trainer_has_become_passes_slurms_warning_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        "if 'RANK' in os.environ:\n"
        "    signal.signal(signal.SIGUSR1, lambda *_: (open(sys.argv[1], 'w').close(), os._exit(0)))\n"
        "    os.kill(os.getppid(), signal.SIGUSR1)\n"
        "    signal.pause()\n"
        "from milepost.strategies.launch import relaunch\n"
        "relaunch(1, 1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1] / "src")}
    environment.pop("PYTEST_CURRENT_TEST")
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "told")], env=environment, capture_output=True, check=False
    )
    assert (tmp_path / "told").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "ddp_spawn"}, "use 'ddp'"),
        ({"strategy": "no_such"}, "use one of"),
        ({"strategy": "single_device", "devices": 2}, "devices=1"),
        ({"devices": 0}, "devices=0"),
        ({"num_nodes": 0}, "num_nodes=0"),
        ({"accelerator": "mps"}, "accelerator='mps'"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        milepost.Trainer(**{"accelerator": "cpu", **arguments})


def test_arguments_for_something_else_name_it() -> None:
    with pytest.raises(MisconfigurationException, match="torchrun"):
        DDPStrategy(cluster_environment=object())


def test_several_devices_mean_ddp() -> None:
    trainer = milepost.Trainer(accelerator="cpu", devices=2, num_nodes=3, **QUIET)
    assert isinstance(trainer.strategy, DDPStrategy)
    assert (trainer.world_size, trainer.num_devices, trainer.num_nodes, trainer.device_ids) == (6, 2, 3, [0, 1])
