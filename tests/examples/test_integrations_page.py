"""The page on integrations: its examples run as printed, one after the other, and leave what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from milepost import Checkpointer
from milepost.cli.main import main
from milepost.integrations.dcp import load_distcp

PAGE = (Path(__file__).parents[2] / "docs/integrations.md").read_text()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(example, names)
    state = names["state"]
    assert isinstance(state, dict) and state["step"] == 100
    with Checkpointer(tmp_path / "runs") as checkpointer:
        assert checkpointer.steps() == [100, 200]
        assert torch.equal(checkpointer.load(100)["model"]["weight"], state["model"]["weight"])
        assert checkpointer.load(200)["run"]["step"] == 0
    assert main(["verify", "runs"]) == 0
    torch.distributed.checkpoint.save({"n": 1}, checkpoint_id="runs/theirs")
    assert main(["convert", "runs/theirs", "runs/ours"]) == 0
    assert load_distcp("runs/theirs") == {"n": 1}
