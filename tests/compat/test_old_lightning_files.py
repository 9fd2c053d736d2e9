"""Files that old Lightning versions really wrote (see write_old_files.py) resume here as in Lightning 2.6."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import milepost

pl = pytest.importorskip("pytorch_lightning")
pytestmark = [pytest.mark.filterwarnings("ignore")]  # Lightning's own warnings are none of ours

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("write_old_files", HERE / "write_old_files.py")
assert spec is not None and spec.loader is not None
jobs = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = jobs
spec.loader.exec_module(jobs)

OLD = {path.stem: path for path in sorted((HERE / "old_lightning").glob("*.ckpt"))}


def model(side: Any, stem: str) -> Any:
    return jobs.line(side) if stem.endswith(("epoch", "middle")) else jobs.pair(side)


def weights(module: Any) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in module.state_dict().items()}


def test_every_version_and_kind_of_file_is_there() -> None:
    expected = {f"{version}-{kind}" for version in jobs.VERSIONS for kind in ("epoch", "middle", "manual")}
    assert set(OLD) == expected | {f"{version}-several" for version in jobs.SEVERAL}


@pytest.mark.parametrize("stem", [stem for stem in OLD if not stem.endswith("several")])
def test_an_old_file_is_resumed_to_the_weights_that_lightning_reaches(stem: str, tmp_path: Path) -> None:
    trainer, ours = jobs.fit(milepost, model(milepost, stem), tmp_path / "ours", 4, resume=OLD[stem])
    reference, theirs = jobs.fit(pl, model(pl, stem), tmp_path / "theirs", 4, resume=OLD[stem])
    assert ours.seen == theirs.seen, "the same batches of the same epochs at the same global steps"
    assert (trainer.global_step, trainer.current_epoch) == (reference.global_step, reference.current_epoch)
    for mine, other in zip(trainer.lr_scheduler_configs, reference.lr_scheduler_configs, strict=True):
        assert mine.scheduler.state_dict() == other.scheduler.state_dict()
    if not stem.endswith("middle"):  # where Lightning trains on the epoch's first batches once more
        assert weights(ours) == weights(theirs)
        if (stopper := trainer.early_stopping_callback) is not None:
            other = reference.early_stopping_callback
            assert (stopper.wait_count, float(stopper.best_score)) == (other.wait_count, float(other.best_score))
    _, whole = jobs.fit(milepost, model(milepost, stem), tmp_path / "whole", 4)
    for name, values in weights(whole).items():
        assert weights(ours)[name] == pytest.approx(values, rel=1e-5), "the file may come from another processor"


@pytest.mark.parametrize("version", jobs.SEVERAL)
def test_a_job_of_several_automatic_optimizers_goes_on_as_a_manual_one(version: str, tmp_path: Path) -> None:
    file = OLD[f"{version}-several"]
    trainer, ours = jobs.fit(milepost, jobs.pair(milepost), tmp_path / "ours", 4, resume=file)
    reference, theirs = jobs.fit(pl, jobs.pair(pl), tmp_path / "theirs", 4, resume=file)
    assert weights(ours) == weights(theirs)
    assert (trainer.current_epoch, trainer.global_step) == (4, 2 * 4 * jobs.BATCHES)
    assert reference.global_step == 2 * 2 * jobs.BATCHES, "Lightning counts from zero again"


@pytest.mark.parametrize("stem", [stem for stem in OLD if stem.endswith("epoch")])
def test_weights_and_hyper_parameters_of_an_old_file_load(stem: str) -> None:
    loaded = type(jobs.line(milepost)).load_from_checkpoint(OLD[stem])
    assert loaded.hparams == {"width": 2}
    raw = torch.load(OLD[stem], weights_only=True)["state_dict"]
    assert torch.equal(loaded.net.weight, raw["net.weight"])


def test_a_module_sees_the_migrated_file_and_the_version_that_wrote_it(tmp_path: Path) -> None:
    seen = {}

    class Curious(type(jobs.line(milepost))):  # type: ignore[misc]
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen.update(checkpoint)

    Curious.load_from_checkpoint(OLD["1.6.0-epoch"])
    assert seen["legacy_pytorch-lightning_version"] == "1.6.0"
    assert "epoch_loop.automatic_optimization.optim_progress" in seen["loops"]["fit_loop"]


def test_an_optimizer_state_from_before_torch_1_12_is_completed(tmp_path: Path) -> None:
    raw = torch.load(OLD["1.6.0-epoch"], weights_only=True)
    (optimizer,) = raw["optimizer_states"]
    for group in optimizer["param_groups"]:
        for option in ("foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
            group.pop(option, None)
    for state in optimizer["state"].values():
        state["step"] = int(state["step"])
    torch.save(raw, tmp_path / "older.ckpt")
    _, ours = jobs.fit(milepost, jobs.line(milepost), tmp_path / "ours", 4, resume=tmp_path / "older.ckpt")
    _, full = jobs.fit(milepost, jobs.line(milepost), tmp_path / "full", 4, resume=OLD["1.6.0-epoch"])
    assert weights(ours) == weights(full)
