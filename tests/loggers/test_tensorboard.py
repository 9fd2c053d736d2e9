"""TensorBoardLogger: what is logged can be read back from the event file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorboard")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scalars_come_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from milepost.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"loss": 0.25}, step=7)
    logger.log_hyperparams({"lr": 0.1, "layers": [1, 2]})
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    (scalar,) = events.Scalars("loss")
    assert (scalar.step, scalar.value) == (7, 0.25)


def test_a_missing_package_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'tensorboard': raise ModuleNotFoundError(name, name='tensorboard')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from milepost.errors import MissingDependencyError\n"
        "from milepost.loggers import TensorBoardLogger\n"
        "try: TensorBoardLogger('.')\n"
        "except MissingDependencyError as e: print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": "src"}, check=True
    )
    assert "milepost[tensorboard]" in done.stdout
