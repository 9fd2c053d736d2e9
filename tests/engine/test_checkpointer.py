"""`Checkpointer` in a plain loop: resumes into live objects, passes over damage, keeps errors and steps apart."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from milepost import Checkpointer
from milepost.engine.commit import REPLACED
from milepost.engine.planner import plan_blob
from milepost.engine.requests import Leaf
from milepost.engine.retention import KeepBest, KeepEvery, KeepNewest
from milepost.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    CheckpointRemoveError,
    CheckpointSaveError,
    MisconfigurationException,
    ResumeError,
    UnencodableValueError,
)
from milepost.storage.store import LocalStore


class Run:
    """A small loop with everything that has state."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.dtype = dtype
        self.state: dict[str, Any] = {
            "model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "extra": {"seen": 0},
            "note": "new",
        }  # fmt: skip

    def step(self, number: int) -> None:
        torch.manual_seed(number)
        self.model(torch.randn(4, 6, dtype=self.dtype)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.state["extra"]["seen"] = number

    def everything(self) -> list[torch.Tensor]:
        moments = [v for s in self.optimizer.state_dict()["state"].values() for v in s.values()]
        rate = torch.tensor(self.optimizer.param_groups[0]["lr"])
        return [*self.model.state_dict().values(), *moments, rate, torch.tensor(self.state["extra"]["seen"])]


def assert_equal(one: Run, other: Run) -> None:
    for a, b in zip(one.everything(), other.everything(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_loop_goes_on_as_if_nothing_had_happened(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = Run(1, dtype)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(whole.state) == 0
        for step in range(1, 6):
            whole.step(step)
            checkpointer.save(step, whole.state, {"loss": 0.5})
    resumed = Run(2, dtype)
    addresses = [p.data_ptr() for p in resumed.model.parameters()]
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1, 2, 3, 4, 5]
        assert checkpointer.restore(resumed.state) == 5
    assert [p.data_ptr() for p in resumed.model.parameters()] == addresses
    assert resumed.state["note"] == "new" and resumed.state["extra"]["seen"] == 5
    assert_equal(whole, resumed)
    for step in range(6, 9):
        whole.step(step)
        resumed.step(step)
    assert_equal(whole, resumed)


def test_moments_keep_their_own_type(tmp_path: Path) -> None:
    """torch's load_state_dict casts fp32 moments of bf16 parameters; here they come back as they were."""
    run = Run(1, torch.bfloat16)
    run.step(1)
    for item in run.optimizer.state.values():
        item["exp_avg"] = item["exp_avg"].float() + 1e-6
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, run.state)
        resumed = Run(2, torch.bfloat16)
        checkpointer.restore(resumed.state)
    assert_equal(run, resumed)


def saved(tmp_path: Path, steps: int = 3) -> Run:
    run = Run(1)
    with Checkpointer(tmp_path, background=False) as checkpointer:
        for step in range(1, steps + 1):
            run.step(step)
            checkpointer.save(step, run.state)
    return run


def damage(tmp_path: Path, step: int) -> None:
    blob = tmp_path / f"step-{step:08d}" / "model.safetensors"
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[-20] ^= 4
    blob.write_bytes(data)


def test_restore_goes_to_the_newest_good_one_and_says_so(tmp_path: Path) -> None:
    saved(tmp_path)
    damage(tmp_path, 3)
    run = Run(5)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.warns(UserWarning, match="passing over the damaged checkpoint of step 3") as told:
            assert checkpointer.restore(run.state) == 2
        assert len(told) == 1 and run.state["extra"]["seen"] == 2
        with pytest.raises(CheckpointCorruptError):
            checkpointer.restore(run.state, step=3)
        with pytest.raises(CheckpointCorruptError, match=r"\d+, in the piece that holds the tensors model\."):
            checkpointer.verify(3)


def test_when_all_are_damaged_it_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    saved(tmp_path, steps=2)
    damage(tmp_path, 1)
    damage(tmp_path, 2)
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.warns(UserWarning, match="passing over"),
        pytest.raises(CheckpointCorruptError, match="step-00000002"),
    ):
        checkpointer.restore(Run(5).state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(other=nn.Linear(1, 1)), "nothing under"),
        (lambda s: s.update(model=nn.Linear(6, 8)), "does not fit Linear"),
        (lambda s: s.update(model=nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))), "shape"),
        (lambda s: s.update(model=Run(1, torch.float64).model), "torch.float64"),
        (lambda s: s.update(optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters())), "parameters"),
    ],
)
def test_what_does_not_fit_touches_nothing(tmp_path: Path, change: Any, message: str) -> None:
    saved(tmp_path)
    run = Run(5)
    change(run.state)
    before = [t.clone() for t in run.everything()]
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ResumeError, match=message):
        checkpointer.restore(run.state)
    for one, other in zip(before, run.everything(), strict=True):
        assert torch.equal(one, other)


def test_load_and_remove_and_what_is_not_there(tmp_path: Path) -> None:
    run = saved(tmp_path)
    with Checkpointer(tmp_path) as checkpointer:
        assert torch.equal(checkpointer.load(3)["model"]["0.weight"], run.model[0].weight)
        checkpointer.remove(3)
        checkpointer.remove(3)
        assert checkpointer.steps() == [1, 2]
        with pytest.raises(CheckpointNotFoundError, match=r"there are: \[1, 2\]"):
            checkpointer.load(3)
        with pytest.raises(CheckpointNotFoundError):
            checkpointer.restore(run.state, step=9)


class Refusing(LocalStore):
    """Refuses one kind of call from some time on."""

    refused = ""

    def rename(self, source: str, target: str) -> None:
        if self.refused == "rename":
            raise OSError(errno.EACCES, "not allowed", source)
        super().rename(source, target)

    def remove_file(self, path: str) -> None:
        if self.refused == "remove_file":
            raise OSError(errno.EIO, "input/output error", path)
        super().remove_file(path)


def test_what_cannot_be_removed_is_an_error_that_says_what_is_left(tmp_path: Path) -> None:
    store = Refusing()
    with Checkpointer(tmp_path, store=store) as checkpointer:
        checkpointer.save(1, {"n": 1}, wait=True)
        store.refused = "rename"
        with pytest.raises(CheckpointRemoveError, match=r"still there.*write") as caught:
            checkpointer.remove(1)
        assert caught.value.path == str(tmp_path / "step-00000001") and isinstance(caught.value, OSError)
        assert checkpointer.load(1) == {"n": 1}
        store.refused = "remove_file"
        with pytest.raises(CheckpointRemoveError, match="no checkpoint any more"):
            checkpointer.remove(1)
        store.refused = ""
        assert checkpointer.steps() == []
    assert list(tmp_path.iterdir()) == []  # listing has swept it


def test_a_step_saved_twice_is_the_newer_one(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        for number in (1, 2):
            checkpointer.save(7, {"n": number})
        checkpointer.wait()
        assert checkpointer.load(7) == {"n": 2} and checkpointer.steps() == [7]


def test_a_failure_in_the_background_does_not_hide_the_error_of_the_loop(tmp_path: Path) -> None:
    (tmp_path / "d").write_text("a file")
    with pytest.raises(RuntimeError, match="the loop") as caught, Checkpointer(tmp_path / "d") as checkpointer:
        checkpointer.save(1, {"n": 1})
        raise RuntimeError("the loop")
    assert any("a save failed" in note for note in caught.value.__notes__)


def test_arguments_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="on_busy='drop'"):
        Checkpointer(tmp_path, on_busy="drop")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="threads=0"):
        Checkpointer(tmp_path, threads=0)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(MisconfigurationException, match="step=-1"):
        checkpointer.save(-1, {})


# ---- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [True, False])
def test_rules_compose_and_what_was_restored_stays(tmp_path: Path, background: bool) -> None:
    rules = KeepNewest(2) | KeepBest(1) | KeepEvery(4)
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0, 5: 4.0, 6: float("nan"), 7: 4.5}
    with Checkpointer(tmp_path, keep=rules, monitor="loss", background=background) as checkpointer:
        for step, loss in losses.items():
            checkpointer.save(step, {"w": torch.full((10,), step)}, {"loss": loss})
        checkpointer.wait()
        assert checkpointer.steps() == [2, 4, 6, 7]
    with Checkpointer(tmp_path, keep=KeepNewest(1), background=background) as later:
        later.restore({"w": torch.zeros(10, dtype=torch.int64)}, step=4)
        later.save(8, {"w": torch.ones(10)})
        later.wait()
        assert later.steps() == [4, 8]


def test_retention_reads_a_damaged_head_as_one_without_a_score(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=KeepNewest(5) | KeepBest(1), monitor="loss") as checkpointer:
        for step in range(3):
            checkpointer.save(step, {"n": step}, {"loss": 1.0}, wait=True)
    head = tmp_path / "step-00000000" / "manifest.json"
    head.chmod(0o644)
    head.write_text("{}")
    with Checkpointer(tmp_path, keep=KeepNewest(1) | KeepBest(1), monitor="loss") as checkpointer:
        checkpointer.save(3, {"n": 3}, {"loss": 2.0}, wait=True)
        assert checkpointer.steps() == [1, 3]


def test_retention_leaves_out_what_another_process_takes_away_meanwhile(tmp_path: Path) -> None:
    class Replacing(LocalStore):
        """With the commit of step 3, another process begins to replace step 2."""

        def rename(self, source: str, target: str) -> None:
            super().rename(source, target)
            if target.endswith("/step-00000003"):
                (tmp_path / "step-00000002").rename(tmp_path / f"{REPLACED}step-00000002")

    with Checkpointer(tmp_path, keep=KeepNewest(2), store=Replacing()) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"n": step}, wait=True)
        assert checkpointer.steps() == [1, 2, 3]
        checkpointer.save(4, {"n": 4}, wait=True)
        assert checkpointer.steps() == [3, 4]


def test_a_failure_after_the_commit_does_not_deny_it(tmp_path: Path) -> None:
    class Refusing(LocalStore):
        def rename(self, source: str, target: str) -> None:
            if source.endswith("/step-00000001"):
                raise PermissionError(errno.EACCES, "not yours", source)
            super().rename(source, target)

    with Checkpointer(tmp_path, keep=KeepNewest(1), store=Refusing()) as checkpointer:
        checkpointer.save(1, {"n": 1}, wait=True)
        with pytest.raises(CheckpointSaveError, match=r"step 2 is committed at .*PermissionError") as told:
            checkpointer.save(2, {"n": 2}, wait=True)
        assert "intact" not in str(told.value) and checkpointer.steps() == [1, 2]


def test_ranking_needs_a_metric(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="monitor="):
        Checkpointer(tmp_path, keep=KeepNewest(1) | KeepBest(1))
    with pytest.raises(MisconfigurationException, match="mode='largest'"):
        Checkpointer(tmp_path, mode="largest")  # type: ignore[arg-type]


def test_groups_whose_tensors_have_the_same_dotted_name_keep_their_own_bytes(tmp_path: Path) -> None:
    state = {
        "model": {"w": torch.ones(3)}, "a": {"b.c": torch.arange(4.0), "b.c#2": torch.full((4,), 5.0)},
        "a.b": {"c": torch.arange(4.0) + 10}, "a.b.c": torch.tensor(7), "z": {"c": torch.arange(2)},
    }  # fmt: skip
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):  # the second one is planned out of memory
            checkpointer.save(step, state, wait=True)
            found = checkpointer.load(step)
            assert torch.equal(found["a"]["b.c"], state["a"]["b.c"])
            assert torch.equal(found["a"]["b.c#2"], state["a"]["b.c#2"])
            assert torch.equal(found["a.b"]["c"], state["a.b"]["c"])
            assert found["a.b.c"] == 7 and found["z"]["c"].tolist() == [0, 1]


def test_a_plan_does_not_write_one_tensor_under_the_name_of_another() -> None:
    leaves = [Leaf(number, "", "w", "F32", (2,)) for number in range(2)]
    with pytest.raises(UnencodableValueError, match=r"'w'"):
        plan_blob("model.safetensors", "", leaves)
