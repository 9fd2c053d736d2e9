"""Profilers under the Trainer: by name, by object, Lightning's own too; what they see and where they report."""

from __future__ import annotations

import json
import pstats
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import milepost
from milepost import Trainer
from milepost.callbacks import Callback
from milepost.errors import MisconfigurationException
from milepost.profilers import AdvancedProfiler, PassThroughProfiler, PyTorchProfiler, SimpleProfiler

LIGHTNINGS_OWN = ["ignore:.*does not have many workers", "ignore:.*isinstance.treespec, LeafSpec", "ignore:GPU avail"]


def net(side: Any = milepost) -> Any:
    class Net(side.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            with self.trainer.profiler.profile("my own"):
                loss: torch.Tensor = self.layer(batch[0]).square().mean()
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.layer(batch[0])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    torch.manual_seed(0)
    return Net()


class Mine(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None: ...


def run(profiler: Any, folder: Path, side: Any = milepost, batches: int = 6, **options: Any) -> Any:
    data = DataLoader(TensorDataset(torch.ones(2 * batches, 4)), batch_size=2)
    trainer = side.Trainer(
        max_epochs=1, logger=False, accelerator="cpu", profiler=profiler, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder, **options,
    )  # fmt: skip
    module = net(side)
    trainer.fit(module, data, data)
    return trainer, module


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("simple", SimpleProfiler, "[LightningModule]Net.optimizer_step"),
        ("advanced", AdvancedProfiler, "Profile stats for: [Strategy]SingleDeviceStrategy.training_step"),
        ("pytorch", PyTorchProfiler, "aten::linear"),
    ],
)
def test_by_name_a_report_is_printed_and_training_is_the_same(
    name: str, kind: type, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, module = run(name, tmp_path)
    report = capsys.readouterr().out
    assert type(trainer.profiler) is kind
    assert "FIT Profiler Report" in report and words in report
    plain = run(None, tmp_path)[1]
    assert torch.equal(plain.layer.weight, module.layer.weight)
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings(*LIGHTNINGS_OWN)
def test_actions_have_lightnings_names(tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")

    class Silent(pl.profilers.SimpleProfiler):  # type: ignore[misc]
        def describe(self) -> None:
            pass

    theirs, ours = Silent(), Silent()
    run(theirs, tmp_path, pl)
    run(ours, tmp_path)

    def seen(profiler: Any) -> set[str]:
        return {re.sub(r"^\[_?\w*(Loop|Fetcher)\]", "", name) for name in profiler.recorded_durations}

    # Hooks that Lightning calls although the module has nothing there, and steps that it takes apart further.
    theirs_only = {name for name in seen(theirs) - seen(ours) if not name.startswith("[Callback]")}
    assert theirs_only <= {
        "[LightningModule]Net.configure_callbacks",
        "[LightningModule]Net.configure_sharded_model",
        "[LightningModule]Net.on_validation_model_eval",
        "[LightningModule]Net.on_validation_model_zero_grad",
        "[LightningModule]Net.on_validation_model_train",
        "[LightningModule]Net.transfer_batch_to_device",
        "[LightningModule]Net.on_before_batch_transfer",
        "[LightningModule]Net.on_after_batch_transfer",
        "[Strategy]SingleDeviceStrategy.batch_to_device",
        "[Strategy]SingleDeviceStrategy.on_train_start",
        "[Strategy]SingleDeviceStrategy.on_train_end",
        "[Strategy]SingleDeviceStrategy.on_train_batch_start",
        "[Strategy]SingleDeviceStrategy.on_validation_start",
        "[Strategy]SingleDeviceStrategy.on_validation_end",
    }
    for name in ("run_training_batch", "[Strategy]SingleDeviceStrategy.training_step", "my own"):
        assert len(ours.recorded_durations[name]) == len(theirs.recorded_durations[name]) == 6


def test_callbacks_are_told_apart_and_the_file_is_named_after_the_stage(tmp_path: Path) -> None:
    trainer, _ = run(SimpleProfiler(filename="times"), tmp_path, callbacks=[Mine()])
    text = (tmp_path / "fit-times.txt").read_text()
    assert "[Callback]Mine.on_train_start" in text and "[FitLoop].train_dataloader_next" in text
    trainer.validate(net(), DataLoader(TensorDataset(torch.ones(2, 4))), verbose=False)
    after = (tmp_path / "validate-times.txt").read_text()
    assert "[EvaluationLoop].val_next" in after and "training_step" not in after


def test_a_run_that_fails_is_reported_too(tmp_path: Path) -> None:
    class Failing(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyError("by the test")

    with pytest.raises(KeyError, match="by the test"):
        run(SimpleProfiler(filename="times"), tmp_path, callbacks=[Failing()])
    assert "training_step" in (tmp_path / "fit-times.txt").read_text()


@pytest.mark.parametrize(("batches", "steps"), [(9, 3), (2, 2)])
def test_pytorch_records_a_few_steps_and_writes_a_trace(batches: int, steps: int, tmp_path: Path) -> None:
    run(PyTorchProfiler(filename="ops"), tmp_path, batches=batches)
    table = (tmp_path / "fit-ops.txt").read_text()
    (trace,) = tmp_path.glob("fit-ops.*.pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
    assert names.count("[Strategy]SingleDeviceStrategy.training_step") == steps
    assert names.count("[module] torch.nn.modules.linear.Linear: layer") >= steps
    assert "[Strategy]SingleDeviceStrategy.backward" in table


@pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end of each cycle")
def test_pytorch_takes_arguments_of_torch(tmp_path: Path) -> None:
    ready: list[Any] = []
    profiler = PyTorchProfiler(
        tmp_path, "ops", schedule=torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=2), record_shapes=True,
        group_by_input_shapes=True, on_trace_ready=ready.append, sort_by_key="count", row_limit=3,
    )  # fmt: skip
    run(profiler, tmp_path)
    assert len(ready) == 2 and not list(tmp_path.glob("*.json"))
    assert "Input Shapes" in (tmp_path / "fit-ops.txt").read_text()


@pytest.mark.parametrize(
    "arguments",
    [{"sort_by_key": "age"}, {"table_kwargs": {"row_limit": 1}}, {"schedule": 3}, {"shapes": True}],
)
def test_arguments_that_torch_does_not_have_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="|".join([*arguments, "row_limit"])):
        PyTorchProfiler(**arguments)


@pytest.mark.filterwarnings(*LIGHTNINGS_OWN)
@pytest.mark.parametrize("name", ["SimpleProfiler", "AdvancedProfiler", "PyTorchProfiler"])
def test_profilers_of_lightning_work(name: str, tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")
    run(getattr(pl.profilers, name)(dirpath=tmp_path, filename="theirs"), tmp_path)
    words = "aten::" if name == "PyTorchProfiler" else "training_step"
    assert words in (tmp_path / "fit-theirs.txt").read_text()


def test_what_is_no_profiler_is_refused() -> None:
    for wrong in ("xla", "detailed", object()):
        with pytest.raises(MisconfigurationException, match="simple"):
            Trainer(profiler=wrong, logger=False, accelerator="cpu")
    assert type(Trainer(logger=False, accelerator="cpu").profiler) is PassThroughProfiler


def test_advanced_measures_nested_actions_one_by_one(tmp_path: Path) -> None:
    profiler = AdvancedProfiler(tmp_path, "calls", dump_stats=True)
    with profiler.profile("outer"):
        sorted([3, 1])
        with profiler.profile("inner"):
            len([3])
        max([3, 1])
    with pytest.raises(MisconfigurationException, match="'outer'"):
        profiler.stop("outer")
    profiler.describe()

    def functions(action: str) -> str:
        return " ".join(key[2] for key in pstats.Stats(str(tmp_path / f"calls-{action}.prof")).stats)  # type: ignore

    assert "sorted" in functions("outer") and "max" in functions("outer") and "len" not in functions("outer")
    assert "len" in functions("inner")
