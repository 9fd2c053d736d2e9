"""A rank that dies, hangs or fails at any point of a save: nothing is committed, and the other one is told in time.

``python tests/distributed/failing_ranks.py`` goes through all points; some of them are here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import failing_ranks
import pytest

from milepost import Checkpointer

HUNG = ("come", "write", "vote", "head")
HERE = [
    s
    for s in failing_ranks.ALL
    if s.what == "kill" or (s.what == "stop" and s.point in HUNG) or s.name in ("0-head-full", "1-vote-full")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, failing_ranks.__file__, "--folder", str(made), "--only", *(s.name for s in HERE)]
    subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    return made


@pytest.mark.parametrize("scenario", HERE, ids=lambda s: s.name)
def test_nothing_is_committed_and_the_other_rank_is_told(folder: Path, scenario: failing_ranks.Scenario) -> None:
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())[scenario.name]
    other, struck = found[str(1 - scenario.rank)], found[str(scenario.rank)]
    assert other["trace"] is None and struck["trace"] is None
    assert other["end"] == "exit", "it does not hang"
    assert other["step"] == 2
    if scenario.hosts:  # it cannot find out more than that nobody can be asked
        assert other["rank"] == 1 and "rank 0 may have committed" in other["error"], other
        return
    assert other["rank"] == scenario.rank, other
    cause = "No space left" if scenario.what == "full" else "it has been killed, or hangs"
    assert cause in other["error"]
    assert struck["end"] == {"kill": "kill", "stop": "stop, exit", "full": "exit"}[scenario.what]
    if scenario.what != "kill":
        assert struck["step"] == 2, "the one that comes back is told that the others have given up"
    assert other["collectives"] == 0
    directory = folder / scenario.name
    with Checkpointer(directory, ranks=None, threads=1) as c:
        assert c.steps() == [1]
        c.verify(1)
        c.save(3, {"model": c.load(1)["model"]}, wait=True)
    assert sorted(path.name for path in directory.iterdir()) == ["step-00000001", "step-00000003"], "swept"
