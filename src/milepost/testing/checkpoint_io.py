"""What any CheckpointIO must do, as tests. Derive from the class, say how yours is made, run pytest."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import pytest
import torch

from milepost.plugins.io import checkpoint_io as io_calls


def example(step: int = 1) -> dict[str, Any]:
    """A checkpoint with the kinds of values that a Trainer saves: about 40 kB."""
    weight = torch.arange(10_000, dtype=torch.float32) + step
    return {
        "epoch": 0,
        "global_step": step,
        "state_dict": {
            "weight": weight,
            "tied": weight,
            "half": torch.ones(3, dtype=torch.bfloat16),
            "none": torch.empty(0),
        },
        "optimizer_states": [
            {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.999), "params": [0]}]}
        ],
        "callbacks": {"a": {"best": None, "scores": [1.5, float("inf")], "name": "ü"}},
        "milepost": {"seed": 2**62, "flag": True, "bytes": b"\x00\xff"},
    }


class Foreign:
    """Something that is no data: a plugin that cannot store it is to say so in `check`."""


class CheckpointIOTests(ABC):
    """Subclass it under a name that starts with ``Test`` and define `make_io`.

    Capabilities beyond the three methods are tested where the plugin offers them, and skipped where it does not.
    """

    @abstractmethod
    def make_io(self) -> Any:
        """A new plugin, as a user would make it."""

    def make_path(self, directory: Path, name: str) -> str:
        """The path that a checkpoint called `name` has in `directory`; override for other kinds of storage."""
        return str(directory / "run" / f"{name}.ckpt")

    def _saved(self, tmp_path: Path, name: str = "a", step: int = 1) -> tuple[Any, str]:
        io, path = self.make_io(), self.make_path(tmp_path, name)
        io_calls.save(io, example(step), path).result()
        return io, path

    def test_it_is_recognised(self) -> None:
        assert io_calls.is_checkpoint_io(self.make_io())

    def test_what_was_saved_comes_back(self, tmp_path: Path) -> None:
        io, path = self._saved(tmp_path)
        assert_same(io_calls.load(io, path), example())

    def test_another_instance_reads_it(self, tmp_path: Path) -> None:
        io, path = self._saved(tmp_path)
        io_calls.teardown(io)
        assert_same(io_calls.load(self.make_io(), path), example())

    def test_saving_again_replaces(self, tmp_path: Path) -> None:
        io, path = self._saved(tmp_path)
        io_calls.save(io, example(2), path).result()
        assert_same(io_calls.load(io, path), example(2))

    def test_later_changes_do_not_reach_what_was_saved(self, tmp_path: Path) -> None:
        io, path = self.make_io(), self.make_path(tmp_path, "a")
        given = example()
        pending = io_calls.save(io, given, path)
        given["state_dict"]["weight"].zero_()
        given["callbacks"]["a"]["scores"].append(9.0)
        pending.result()
        assert_same(io_calls.load(io, path), example())

    def test_the_checkpoint_passed_in_is_left_alone(self, tmp_path: Path) -> None:
        io, given = self.make_io(), example()
        io_calls.save(io, given, self.make_path(tmp_path, "a")).result()
        assert_same(given, example())

    def test_loading_twice_gives_separate_tensors(self, tmp_path: Path) -> None:
        io, path = self._saved(tmp_path)
        io_calls.load(io, path)["state_dict"]["weight"].zero_()
        assert_same(io_calls.load(io, path), example())

    def test_a_missing_checkpoint_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises((OSError, ValueError, KeyError)):
            io_calls.load(self.make_io(), self.make_path(tmp_path, "missing"))

    def test_removing_removes_that_one_only(self, tmp_path: Path) -> None:
        io, path = self._saved(tmp_path, "a")
        other = self.make_path(tmp_path, "b")
        io_calls.save(io, example(2), other).result()
        io_calls.remove(io, path)
        with pytest.raises((OSError, ValueError, KeyError)):
            io_calls.load(io, path)
        assert_same(io_calls.load(io, other), example(2))

    def test_removing_what_is_not_there_does_nothing(self, tmp_path: Path) -> None:
        io_calls.remove(self.make_io(), self.make_path(tmp_path, "missing"))

    def test_saving_draws_no_random_numbers(self, tmp_path: Path) -> None:
        before = torch.get_rng_state()
        self._saved(tmp_path)
        assert torch.equal(before, torch.get_rng_state())

    def test_a_save_that_cannot_work_is_an_error(self, tmp_path: Path) -> None:
        blocked = tmp_path / "blocked"
        blocked.write_text("a file where a directory must be")
        io, path = self.make_io(), self.make_path(blocked, "a")
        if blocked.name not in path:
            pytest.skip("paths of this plugin are not files")
        with pytest.raises(Exception):  # noqa: B017  # any error will do, silence will not
            io_calls.save(io, example(), path).result()

    def test_a_failed_save_is_told_of_once(self, tmp_path: Path) -> None:
        blocked = tmp_path / "blocked"
        blocked.write_text("a file where a directory must be")
        io, path = self.make_io(), self.make_path(blocked, "a")
        if blocked.name not in path:
            pytest.skip("paths of this plugin are not files")
        pending = None
        with pytest.raises(Exception):  # noqa: B017
            pending = io_calls.save(io, example(), path)
            pending.result()
        if pending is not None:
            assert pending.done()
            pending.result()
        io_calls.wait(io)
        io_calls.teardown(io)

    def test_a_save_that_fails_midway_leaves_what_was_there(self, tmp_path: Path) -> None:
        io, path = self._saved(tmp_path)
        try:
            io_calls.save(io, {**example(2), "lock": threading.Lock()}, path).result()
        except Exception:
            assert_same(io_calls.load(io, path), example())
            return
        pytest.skip("the plugin stores even a lock")

    def test_a_load_sees_what_was_asked_to_be_saved_before(self, tmp_path: Path) -> None:
        io, path = self._saved(tmp_path)
        io_calls.save(io, example(2), path)
        assert_same(io_calls.load(io, path), example(2))
        io_calls.teardown(io)

    def test_a_removal_comes_after_what_was_asked_to_be_saved_before(self, tmp_path: Path) -> None:
        io, path = self.make_io(), self.make_path(tmp_path, "a")
        pending = io_calls.save(io, example(), path)
        io_calls.remove(io, path)
        pending.result()
        io_calls.teardown(io)
        with pytest.raises((OSError, ValueError, KeyError)):
            io_calls.load(self.make_io(), path)

    def test_a_handle_that_gave_its_result_is_done(self, tmp_path: Path) -> None:
        pending = io_calls.save(self.make_io(), example(), self.make_path(tmp_path, "a"))
        pending.result()
        assert pending.done() is True

    def test_after_wait_everything_is_there(self, tmp_path: Path) -> None:
        io, path = self.make_io(), self.make_path(tmp_path, "a")
        self._needs(io, "wait")
        io_calls.save(io, example(), path)
        io_calls.wait(io)
        assert_same(io_calls.load(self.make_io(), path), example())
        io_calls.teardown(io)

    def test_after_teardown_everything_is_there(self, tmp_path: Path) -> None:
        io, path = self.make_io(), self.make_path(tmp_path, "a")
        io_calls.save(io, example(), path)
        io_calls.teardown(io)
        assert_same(io_calls.load(self.make_io(), path), example())

    def test_another_run_follows_teardown(self, tmp_path: Path) -> None:
        io, path = self._saved(tmp_path)
        io_calls.teardown(io)
        io_calls.save(io, example(2), path).result()
        assert_same(io_calls.load(io, path), example(2))
        io_calls.teardown(io)

    def test_exists(self, tmp_path: Path) -> None:
        io, path = self._saved(tmp_path)
        self._needs(io, "exists")
        assert io_calls.exists(io, path) is True
        assert io_calls.exists(io, self.make_path(tmp_path, "missing")) is False
        io_calls.remove(io, path)
        assert io_calls.exists(io, path) is False

    def test_list(self, tmp_path: Path) -> None:
        io, path = self._saved(tmp_path)
        self._needs(io, "list")
        assert io_calls.list_checkpoints(io, Path(path).parent) == [path]
        assert io_calls.list_checkpoints(io, tmp_path / "nowhere") == []
        second = self.make_path(tmp_path, "b")
        io_calls.save(io, example(2), second).result()
        assert sorted(io_calls.list_checkpoints(io, Path(path).parent) or []) == sorted([path, second])
        io_calls.remove(io, path)
        assert io_calls.list_checkpoints(io, Path(path).parent) == [second]

    def test_probe_leaves_nothing(self, tmp_path: Path) -> None:
        io = self.make_io()
        self._needs(io, "probe")
        free = io_calls.probe(io, tmp_path / "not" / "there")
        assert free is None or free > 0
        assert list(tmp_path.iterdir()) == []

    def test_check_passes_what_a_trainer_saves_and_changes_nothing(self) -> None:
        io, given = self.make_io(), example()
        self._needs(io, "check")
        before = torch.get_rng_state()
        io_calls.check(io, given)
        assert_same(given, example())
        assert torch.equal(before, torch.get_rng_state())

    def test_what_check_passes_comes_back(self, tmp_path: Path) -> None:
        io, path = self.make_io(), self.make_path(tmp_path, "a")
        self._needs(io, "check")
        given = {**example(), "foreign": Foreign()}
        try:
            io_calls.check(io, given)
        except Exception:  # it says that it cannot store it: that is what the check is for
            return
        io_calls.save(io, given, path).result()
        assert isinstance(io_calls.load(io, path)["foreign"], Foreign)

    def test_link(self, tmp_path: Path) -> None:
        io, path = self._saved(tmp_path)
        self._needs(io, "link")
        second = self.make_path(tmp_path, "second")
        if not io_calls.link(io, path, second):
            pytest.skip("linking is not possible on this file system")
        io_calls.remove(io, path)
        assert_same(io_calls.load(io, second), example())

    @pytest.mark.parametrize(
        "damage", ["bit 0", "bit 0.2", "bit 0.5", "bit 0.8", "bit 1", "cut 0.5", "cut 0.999", "more"]
    )
    def test_verify_finds_damage(self, tmp_path: Path, damage: str) -> None:
        io, path = self._saved(tmp_path)
        self._needs(io, "verify")
        if io_calls.verify(io, path) == "cannot" or not Path(path).is_file():
            pytest.skip("the plugin cannot verify, or its checkpoints are not single files")
        content = bytearray(Path(path).read_bytes())
        what, _, where = damage.partition(" ")
        position = int(float(where or 1) * (len(content) - 1))
        if what == "bit":
            content[position] ^= 1
        Path(path).write_bytes({"bit": content, "cut": content[:position], "more": content + b"x"}[what])
        with pytest.raises(Exception):  # noqa: B017  # any error will do, silence will not
            io_calls.verify(io, path)

    def _needs(self, io: Any, capability: str) -> None:
        if not callable(getattr(io, capability, None)):
            pytest.skip(f"the plugin does not offer `{capability}`")


def assert_same(found: Any, expected: Any, path: str = "checkpoint") -> None:
    """Compare nested values bit for bit, types of tensors and the tie between tied tensors included."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor), f"{path}: {type(found).__name__} instead of a tensor"
        assert found.dtype == expected.dtype, f"{path}: {found.dtype} instead of {expected.dtype}"
        assert torch.equal(found, expected), f"{path}: other values"
    elif isinstance(expected, dict):
        assert isinstance(found, dict), f"{path}: {type(found).__name__} instead of a dict"
        assert list(found) == list(expected), f"{path}: keys {list(found)} instead of {list(expected)}"
        for key, value in expected.items():
            assert_same(found[key], value, f"{path}.{key}")
        if "tied" in expected:
            assert found["tied"].data_ptr() == found["weight"].data_ptr(), f"{path}: tied tensors came back apart"
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected), f"{path}: {type(found).__name__} instead of {type(expected).__name__}"
        assert len(found) == len(expected), f"{path}: {len(found)} items instead of {len(expected)}"
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{path}.{index}")
    else:
        assert type(found) is type(expected) and found == expected, f"{path}: {found!r} instead of {expected!r}"
