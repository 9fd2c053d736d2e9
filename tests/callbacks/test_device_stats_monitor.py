"""DeviceStatsMonitor: Lightning's names at Lightning's steps, and a clear word where something is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from both_sides import LIGHTNINGS_OWN, points

import milepost
from milepost.callbacks import DeviceStatsMonitor
from milepost.errors import MisconfigurationException
from milepost.loggers import Logger

pytest.importorskip("psutil")
pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNINGS_OWN]


def net(side: Any) -> Any:
    class Net(side.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.layer(batch[0]).square().mean()
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.layer(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Net()


def logged(side: Any, folder: Path, **options: Any) -> list[tuple[int | None, list[str]]]:
    """The step and the names of each call of the logger, in order."""
    calls: list[tuple[int | None, list[str]]] = []
    base = Logger if side is milepost else side.loggers.Logger

    class Notes(base):  # type: ignore[misc, valid-type]
        name, version = "notes", 0

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if any(key.startswith("DeviceStats") for key in metrics):
                assert all(isinstance(value, int | float) for value in metrics.values())
                calls.append((step, sorted(metrics)))

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

    trainer = side.Trainer(
        max_epochs=1, logger=Notes(), accelerator="cpu", log_every_n_steps=2, default_root_dir=folder,
        callbacks=[side.callbacks.DeviceStatsMonitor(**options)], enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(net(side), points(), points())
    return calls


def test_names_and_steps_are_those_of_lightning(tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")
    ours = logged(milepost, tmp_path)
    assert ours == logged(pl, tmp_path)
    assert "DeviceStatsMonitor.on_train_batch_start/cpu_vm_percent" in ours[0][1]
    assert logged(milepost, tmp_path, cpu_stats=False) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_logs_its_memory() -> None:
    from milepost.accelerators.stats import accelerator_stats

    held = torch.ones(1024, device="cuda")
    assert accelerator_stats(held.device)["allocated_bytes.all.current"] >= held.nbytes


def test_without_a_logger_it_is_refused(tmp_path: Path) -> None:
    trainer = milepost.Trainer(
        logger=False, accelerator="cpu", callbacks=DeviceStatsMonitor(), default_root_dir=tmp_path
    )
    with pytest.raises(MisconfigurationException, match="logger"):
        trainer.fit(net(milepost), points())


def test_a_missing_package_names_the_extra() -> None:
    code = (
        "import sys\n"
        "sys.modules['psutil'] = None\n"
        "from milepost.accelerators.stats import cpu_stats\n"
        "from milepost.errors import MissingDependencyError\n"
        "try: cpu_stats()\n"
        "except MissingDependencyError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "milepost[stats]" in done.stdout
