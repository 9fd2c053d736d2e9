"""Local files: whole or absent, durable, each failure one error; broken by the kernel, by limits and by kills."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from milepost.errors import CheckpointSaveError
from milepost.storage import local

HERE = Path(__file__).parent


def run(script: str, *arguments: Any) -> Any:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if "takes no filter" in finished.stderr:
        pytest.skip("the kernel takes no seccomp filter here")
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


# ---- each system call refused, or the last one made --------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        pytest.skip("the numbers of the system calls are those of Linux on x86_64")
    found = run("faulty_save.py", tmp_path_factory.mktemp("faults"))
    return {(o["call"], o["errno"]): o for o in found}


@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EROFS", "EPERM"])
@pytest.mark.parametrize("call", ["openat", "write", "fsync", "rename", "mkdir"])
def test_a_refused_call_is_one_error_with_path_and_cause_and_the_old_file_stays(
    outcomes: dict[tuple[str, str], dict[str, Any]], call: str, name: str
) -> None:
    outcome = outcomes[(call, name)]
    assert outcome["said"] != "saved"
    cause, path, step, message = outcome["said"]
    assert cause == name and path.endswith("a.ckpt") and step == 7
    assert repr(path) in message and "step 7" in message and os.strerror(getattr(errno, name)) in message
    assert outcome["content"] == ("none" if call == "mkdir" else "old") and "intact" in message
    assert outcome["left"] == ([] if call == "mkdir" else ["a.ckpt"]) and outcome["swept"]


def test_without_locks_a_save_works_all_the_same(outcomes: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert outcomes[("flock", "EIO")]["said"] == "saved" and outcomes[("flock", "EIO")]["content"] == "new"


@pytest.mark.parametrize("call", ["openat", "flock", "write", "fsync", "rename"])
def test_a_process_killed_at_a_call_leaves_the_old_file_and_the_next_save_sweeps(
    outcomes: dict[tuple[str, str], dict[str, Any]], call: str
) -> None:
    outcome = outcomes[(call, "killed")]
    assert outcome["status"] != 0 and outcome["said"] is None
    assert outcome["content"] == "old" and outcome["swept"]


def test_200_savers_die_and_every_time_the_old_or_the_new_is_there(tmp_path: Path) -> None:
    seen = run("dying_saver.py", tmp_path, 0)
    assert seen == {"died in a write": 160, "killed": 40, "moved on": 40, "left": ["a.ckpt"]}


# ---- real file systems -------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def write(path: Path, content: bytes) -> None:
    with local.replacing(path, step=7) as file:
        file.write(content)


def test_a_full_disk(small_disk: Path) -> None:
    write(small_disk / "a.ckpt", b"old")
    with pytest.raises(CheckpointSaveError, match="No space left") as caught:
        write(small_disk / "a.ckpt", bytes(1 << 21))
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC
    assert (small_disk / "a.ckpt").read_bytes() == b"old" and [p.name for p in small_disk.iterdir()] == ["a.ckpt"]
    write(small_disk / "a.ckpt", bytes(1 << 19))  # the room was given back


def test_a_disk_that_may_only_be_read(small_disk: Path) -> None:
    write(small_disk / "a.ckpt", b"old")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointSaveError, match="Read-only file system"):
        write(small_disk / "a.ckpt", b"new")
    assert (small_disk / "a.ckpt").read_bytes() == b"old"
    assert local.link(small_disk / "a.ckpt", small_disk / "b.ckpt") is False


def test_a_directory_that_may_not_be_written(tmp_path: Path) -> None:
    """As another user where the tests run as root, who may write anywhere."""
    place = tmp_path / "closed"
    place.mkdir()
    write(place / "a.ckpt", b"old")
    place.chmod(0o555)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(parent.stat().st_mode | 0o055)
    program = (
        "import os, sys; from pathlib import Path\nfrom milepost.storage import local\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "with local.replacing(Path(sys.argv[1]), step=7) as file: file.write(b'new')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    died = subprocess.run(
        [sys.executable, "-c", program, str(place / "a.ckpt")], capture_output=True, text=True, env=environment
    )
    place.chmod(0o755)
    assert died.returncode == 1
    assert "CheckpointSaveError: Saving the checkpoint of step 7" in died.stderr and "Permission denied" in died.stderr
    assert (place / "a.ckpt").read_bytes() == b"old" and [p.name for p in place.iterdir()] == ["a.ckpt"]


def test_no_descriptor_left(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    write(tmp_path / "a.ckpt", b"old")
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(CheckpointSaveError) as caught:
            write(tmp_path / "a.ckpt", b"new")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.EMFILE
    assert (tmp_path / "a.ckpt").read_bytes() == b"old"


# ---- names, links, leftovers -------------------------------------------------------------------------------------


def test_the_longest_name_a_file_may_have(tmp_path: Path) -> None:
    for name in ("x" * 250 + ".ckpt", "ü" * 125 + ".ckpt"):
        write(tmp_path / name, b"whole")
        assert (tmp_path / name).read_bytes() == b"whole"
        (tmp_path / name).unlink()
    assert list(tmp_path.iterdir()) == []


def test_a_new_file_gets_the_mode_that_any_file_gets(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write(tmp_path / "a.ckpt", b"")
    finally:
        os.umask(previous)
    assert (tmp_path / "a.ckpt").stat().st_mode & 0o777 == 0o640


def test_an_interrupt_leaves_the_old_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "a.ckpt", b"old")
    with pytest.raises(KeyboardInterrupt), local.replacing(tmp_path / "a.ckpt") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "a.ckpt").read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_second_name_replaces_what_was_there_and_stays_when_the_first_goes(tmp_path: Path) -> None:
    write(tmp_path / "a.ckpt", b"a")
    write(tmp_path / "deep" / "last.ckpt", b"old")
    for _ in range(2):
        assert local.link(tmp_path / "a.ckpt", tmp_path / "deep" / "last.ckpt") is True
    local.remove(tmp_path / "a.ckpt")
    local.remove(tmp_path / "a.ckpt")
    assert (tmp_path / "deep" / "last.ckpt").read_bytes() == b"a"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["last.ckpt"]
    assert local.link(tmp_path / "missing", tmp_path / "b.ckpt") is False and not (tmp_path / "b.ckpt").exists()


def test_a_name_that_a_killed_link_left_is_swept(tmp_path: Path) -> None:
    write(tmp_path / "a.ckpt", b"a")
    os.link(tmp_path / "a.ckpt", tmp_path / ".last.ckpt.0123.pending")
    write(tmp_path / "b.ckpt", b"b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt", "b.ckpt"]
    assert (tmp_path / "a.ckpt").read_bytes() == b"a"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is fsynced and renamed, in order, and what it is called then; all of it is done as well."""
    seen: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(number: int) -> None:
        seen.append(("fsync", Path(f"/proc/self/fd/{number}").readlink().name))
        fsync(number)

    def note_replace(source: Any, target: Any) -> None:
        seen.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    return seen


def test_the_file_is_durable_before_its_name_and_its_name_before_the_return(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    write(tmp_path / "a.ckpt", b"whole")
    (_, pending), *others = calls
    assert calls[0][0] == "fsync" and pending.startswith(".a.ckpt.") and pending.endswith(".pending")
    assert others == [("rename", "a.ckpt"), ("fsync", tmp_path.name)]
    calls.clear()
    local.link(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    assert calls == [("rename", "b.ckpt"), ("fsync", tmp_path.name)]
    calls.clear()
    local.remove(tmp_path / "b.ckpt")
    assert calls == [("fsync", tmp_path.name)]


def test_directories_that_a_save_makes_are_durable_entries_of_their_parents(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    write(tmp_path / "one" / "two" / "a.ckpt", b"whole")
    assert calls[:2] == [("fsync", tmp_path.name), ("fsync", "one")] and calls[-1] == ("fsync", "two")
    calls.clear()
    write(tmp_path / "one" / "two" / "a.ckpt", b"whole")
    assert len(calls) == 3


def test_a_directory_that_cannot_be_synced_after_the_rename_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.ckpt", b"old")
    real = os.fsync

    def refuse_directories(number: int) -> None:
        if Path(f"/proc/self/fd/{number}").is_dir():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(number)

    monkeypatch.setattr(os, "fsync", refuse_directories)
    with pytest.raises(CheckpointSaveError, match=r"Input/output error.*in its place.*power cut") as caught:
        write(tmp_path / "a.ckpt", b"new")
    assert "intact" not in str(caught.value) and (tmp_path / "a.ckpt").read_bytes() == b"new"


def test_a_sweep_in_the_middle_of_a_link_leaves_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.ckpt", b"a")
    real = os.link

    def link_then_sweep(source: Any, target: Any) -> None:
        real(source, target)
        local.sweep(tmp_path)  # as a save in another process would, at the worst moment

    monkeypatch.setattr(os, "link", link_then_sweep)
    assert local.link(tmp_path / "a.ckpt", tmp_path / "last.ckpt") is True
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt", "last.ckpt"]
