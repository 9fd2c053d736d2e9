"""The contract of each call of a `Store`, as tests."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from milepost.storage.store import ALIGN_BYTES, Store
from milepost.testing.disks import Disk, Syncs, files_limited_to, open_files, small_disk

_MANY = 64 * ALIGN_BYTES


class StoreCallTests(ABC):
    """One call at a time. `StoreTests` is what to derive from."""

    syncs_through_python = True
    """Whether the store calls ``os.fsync`` or ``os.fdatasync``. With False, only a real disk shows what is durable."""

    @abstractmethod
    def make_store(self) -> Store:
        """A new store, as a user would make it."""

    def make_root(self, tmp_path: Path) -> Path:
        """An empty directory to work in, removed afterwards; override to test on another file system."""
        return tmp_path

    @pytest.fixture
    def root(self, tmp_path: Path) -> Iterator[Path]:
        """Checks after each test that the store has left no file open."""
        made, before = self.make_root(tmp_path), open_files()
        yield made
        shutil.rmtree(made)
        assert open_files() == before, "a file was left open"

    # ---- new files ---------------------------------------------------------------------------------------------------

    def test_a_file_holds_what_was_written(self, root: Path) -> None:
        assert written(self.make_store(), root / "a", b"some bytes").read_bytes() == b"some bytes"

    def test_an_empty_file(self, root: Path) -> None:
        store = self.make_store()
        store.finish(store.create(str(root / "a"), 0), 0)
        assert (root / "a").read_bytes() == b""

    def test_a_file_that_is_there_is_not_created_again(self, root: Path) -> None:
        (root / "a").write_bytes(b"somebody's")
        for size in (0, _MANY):
            with raises(errno.EEXIST, root / "a"):
                self.make_store().create(str(root / "a"), size)
        assert (root / "a").read_bytes() == b"somebody's"

    def test_a_link_that_leads_nowhere_is_not_followed(self, root: Path) -> None:
        (root / "a").symlink_to(root / "elsewhere")
        with raises(errno.EEXIST, root / "a"):
            self.make_store().create(str(root / "a"), 0)
        assert not (root / "elsewhere").exists()

    def test_a_file_is_not_created_where_there_is_no_directory(self, root: Path) -> None:
        with raises(errno.ENOENT, root / "none" / "a"):
            self.make_store().create(str(root / "none" / "a"), _MANY)

    def test_of_many_that_create_one_file_one_succeeds(self, root: Path) -> None:
        store, gate = self.make_store(), threading.Barrier(8)
        made: list[int | None] = []

        def create() -> None:
            gate.wait(20)
            try:
                made.append(store.create(str(root / "a"), _MANY))
            except FileExistsError:
                made.append(None)

        in_threads([create] * 8)
        (descriptor,) = [each for each in made if each is not None]
        assert len(made) == 8
        store.abandon(descriptor)

    def test_space_is_reserved(self, root: Path) -> None:
        with (root / "probe").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, _MANY)
            if os.fstat(file.fileno()).st_blocks * 512 < _MANY:
                pytest.skip("this file system does not tell what it has reserved")
        store = self.make_store()
        descriptor = store.create(str(root / "a"), _MANY)
        reserved = (root / "a").stat().st_blocks * 512
        store.abandon(descriptor)
        assert reserved >= _MANY, f"{reserved} bytes of {_MANY}"

    def test_that_there_is_no_space_is_known_at_once(self, root: Path) -> None:
        with small_disk_or_skip(root / "disk", 1 << 20) as disk, raises(errno.ENOSPC, disk / "a"):
            self.make_store().create(str(disk / "a"), 2 << 20)

    # ---- writing -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "pieces",
        [
            [(0, _MANY)],
            [(_MANY // 2, _MANY // 2), (0, _MANY // 2)],
            [(0, ALIGN_BYTES), (ALIGN_BYTES, 1000), (ALIGN_BYTES + 1000, ALIGN_BYTES)],
            [(0, 10), (10, ALIGN_BYTES), (2 * ALIGN_BYTES, 2 * ALIGN_BYTES)],
            [(0, ALIGN_BYTES), (8 * ALIGN_BYTES - 7, 7), (3 * ALIGN_BYTES, ALIGN_BYTES)],
            [(0, 2 * ALIGN_BYTES), (ALIGN_BYTES // 2, ALIGN_BYTES), (1, 1)],
        ],
        ids=["at once", "backwards", "odd length", "odd offset", "with gaps", "over each other"],
    )
    @pytest.mark.parametrize("shift", [0, 8], ids=["aligned", "unaligned"])
    def test_bytes_arrive_at_their_offsets(self, root: Path, pieces: list[tuple[int, int]], shift: int) -> None:
        store, expected = self.make_store(), bytearray(max(start + size for start, size in pieces))
        descriptor = store.create(str(root / "a"), len(expected))
        for number, (start, size) in enumerate(pieces):
            data = in_memory(size, shift, seed=number)
            store.write(descriptor, data, start)
            expected[start : start + size] = data
        store.finish(descriptor, len(expected))
        assert (root / "a").read_bytes() == expected

    def test_read_only_memory_and_none_at_all(self, root: Path) -> None:
        store = self.make_store()
        descriptor = store.create(str(root / "a"), 0)
        store.write(descriptor, memoryview(b""), 0)
        store.write(descriptor, memoryview(b"bytes"), 3)
        store.finish(descriptor, 8)
        assert (root / "a").read_bytes() == b"\0\0\0bytes"

    def test_more_than_was_reserved(self, root: Path) -> None:
        path = written(self.make_store(), root / "a", b"x" * _MANY, reserved=ALIGN_BYTES)
        assert path.read_bytes() == b"x" * _MANY

    def test_the_buffer_is_the_callers_again(self, root: Path) -> None:
        store, data = self.make_store(), in_memory(_MANY, 0)
        expected = bytes(data)
        descriptor = store.create(str(root / "a"), _MANY)
        store.write(descriptor, data, 0)
        data[:] = bytes(_MANY)
        store.finish(descriptor, _MANY)
        assert (root / "a").read_bytes() == expected

    @pytest.mark.parametrize("size", [_MANY, _MANY - 100], ids=["aligned", "unaligned"])
    def test_a_write_of_which_only_a_part_arrives_fails(self, root: Path, size: int) -> None:
        """The system says how much it has written and no more; what is left must be tried, and then fails."""
        store = self.make_store()
        descriptor = store.create(str(root / "a"), ALIGN_BYTES)
        with files_limited_to(_MANY // 2), raises(errno.EFBIG, root / "a"):
            store.write(descriptor, in_memory(size, 0), 0)
        store.abandon(descriptor)

    def test_a_disk_that_fills_up_fails_the_write(self, root: Path) -> None:
        with small_disk_or_skip(root / "disk", 1 << 20) as disk:
            store = self.make_store()
            descriptor = store.create(str(disk / "a"), 0)
            try:
                with raises(errno.ENOSPC, disk / "a"):
                    store.write(descriptor, in_memory(2 << 20, 0), 0)
            finally:
                store.abandon(descriptor)

    def test_threads_write_to_one_file(self, root: Path) -> None:
        store, chunk = self.make_store(), 8 * ALIGN_BYTES
        descriptor = store.create(str(root / "a"), 32 * chunk)
        chunks = [in_memory(chunk if n % 5 else chunk - 1, 0, seed=n) for n in range(32)]
        left = iter(range(32))

        def work() -> None:
            for number in left:
                store.write(descriptor, chunks[number], number * chunk)

        in_threads([work] * 4)
        store.finish(descriptor, 32 * chunk)
        found = (root / "a").read_bytes()
        for number, data in enumerate(chunks):
            assert found[number * chunk : number * chunk + len(data)] == bytes(data), f"chunk {number}"

    def test_several_files_are_open(self, root: Path) -> None:
        store = self.make_store()
        paths = [root / name for name in "abc"]
        descriptors = [store.create(str(path), _MANY) for path in paths]
        for number, descriptor in enumerate(descriptors):
            store.write(descriptor, in_memory(_MANY, 0, seed=number), 0)
        for descriptor in reversed(descriptors):
            store.finish(descriptor, _MANY)
        for number, path in enumerate(paths):
            assert path.read_bytes() == bytes(in_memory(_MANY, 0, seed=number))

    def test_threads_write_to_files_of_their_own(self, root: Path) -> None:
        store = self.make_store()

        def work(name: str) -> None:
            for number in range(8):
                data = name.encode() * (ALIGN_BYTES * (number % 3) + 1)
                assert written(store, root / f"{name}{number}", data).read_bytes() == data

        in_threads([lambda name=name: work(name) for name in "abcd"])  # type: ignore[misc]

    # ---- the end of a file -------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("size", [0, 1, ALIGN_BYTES, _MANY - 1, _MANY, _MANY + 5])
    def test_a_finished_file_has_its_size(self, root: Path, size: int) -> None:
        path = written(self.make_store(), root / "a", b"x" * _MANY, size=size)
        assert path.read_bytes() == (b"x" * _MANY)[:size].ljust(size, b"\0")

    def test_a_finished_file_is_read_only(self, root: Path) -> None:
        assert stat.S_IMODE(written(self.make_store(), root / "a", b"x").stat().st_mode) & 0o777 == 0o444

    def test_a_finish_that_fails_says_so_and_closes(self, root: Path) -> None:
        store = self.make_store()
        descriptor = store.create(str(root / "a"), 0)
        with files_limited_to(_MANY), raises(errno.EFBIG, root / "a"):
            store.finish(descriptor, 2 * _MANY)

    def test_abandoning_closes(self, root: Path) -> None:
        store = self.make_store()
        descriptor = store.create(str(root / "a"), _MANY)
        store.write(descriptor, in_memory(ALIGN_BYTES, 0), 0)
        store.abandon(descriptor)
        store.remove_file(str(root / "a"))
        assert list(root.iterdir()) == []

    # ---- what is durable ---------------------------------------------------------------------------------------------

    def test_a_finished_file_was_synced_with_its_last_size(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        syncs = self._syncs(monkeypatch)
        for number, (reserved, size) in enumerate([(0, 10), (_MANY, _MANY - 7), (_MANY, _MANY)]):
            path = written(self.make_store(), root / str(number), b"x" * size, reserved=reserved, size=size)
            assert syncs.of(path), f"{size} bytes were not synced"
            assert syncs.of(path)[-1].size == size, "the file was cut after it was synced"
            assert not syncs.of(path)[-1].writable, "the file was made read-only after it was synced"

    def test_a_sync_that_fails_is_an_error_and_not_tried_again(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The system forgets what it could not write: a second fsync would succeed, and mean nothing."""
        store, syncs = self.make_store(), self._syncs(monkeypatch)
        descriptor = store.create(str(root / "a"), 0)
        syncs.error = errno.EIO
        with raises(errno.EIO, root / "a"):
            store.finish(descriptor, 0)
        assert len(syncs.seen) == 1
        with raises(errno.EIO, root):
            store.sync_directory(str(root))
        assert len(syncs.seen) == 2

    def test_a_synced_directory_was_synced(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        syncs = self._syncs(monkeypatch)
        self.make_store().sync_directory(str(root))
        assert syncs.of(root)

    def test_what_is_durable_outlives_a_power_cut(self, root: Path) -> None:
        """On an ext4 that is shut down, journal and all, and mounted again."""
        with power_or_skip(root) as disk:
            store, place = self.make_store(), disk.mounted
            data = bytes(in_memory(_MANY, 0)) + b"odd"
            written(store, place / "file", data)
            store.sync_directory(str(place))
            disk.cut_and_mounted_again()
            assert (place / "file").read_bytes() == data
            store.rename(str(place / "file"), str(place / "moved"))
            store.make_directory(str(place / "directory"))
            store.sync_directory(str(place))
            disk.cut_and_mounted_again()
            assert not (place / "file").exists()
            assert (place / "moved").read_bytes() == data
            assert (place / "directory").is_dir()

    def test_a_synced_directory_that_is_missing(self, root: Path) -> None:
        with raises(errno.ENOENT, root / "none"):
            self.make_store().sync_directory(str(root / "none"))

    # ---- names -------------------------------------------------------------------------------------------------------

    def test_make_directory(self, root: Path) -> None:
        store = self.make_store()
        store.make_directory(str(root / "d"))
        assert (root / "d").is_dir()
        with raises(errno.EEXIST, root / "d"):
            store.make_directory(str(root / "d"))
        with raises(errno.ENOENT, root / "none" / "d"):
            store.make_directory(str(root / "none" / "d"))

    def test_link_gives_a_second_name(self, root: Path) -> None:
        store = self.make_store()
        written(store, root / "a", b"x")
        try:
            store.link(str(root / "a"), str(root / "b"))
        except OSError as error:
            assert error.errno in (errno.EPERM, errno.ENOTSUP, errno.EMLINK)
            pytest.skip("this file system has no links")
        assert (root / "a").samefile(root / "b")
        store.remove_file(str(root / "a"))
        assert (root / "b").read_bytes() == b"x"

    def test_link_replaces_nothing(self, root: Path) -> None:
        (root / "a").write_bytes(b"x")
        (root / "b").write_bytes(b"y")
        with raises(errno.EEXIST, root / "a", root / "b"):
            self.make_store().link(str(root / "a"), str(root / "b"))
        assert (root / "b").read_bytes() == b"y"
        with raises(errno.ENOENT, root / "none", root / "c"):
            self.make_store().link(str(root / "none"), str(root / "c"))

    @pytest.mark.parametrize("call", ["link", "rename"])
    def test_to_another_file_system(self, root: Path, call: str) -> None:
        """Neither may copy: a copy is not made in one step."""
        with small_disk_or_skip(root / "disk", 1 << 20) as disk:
            (root / "a").write_bytes(b"x")
            with raises(errno.EXDEV, root / "a", disk / "a"):
                getattr(self.make_store(), call)(str(root / "a"), str(disk / "a"))
            assert (root / "a").exists() and not (disk / "a").exists()

    def test_rename(self, root: Path) -> None:
        store = self.make_store()
        directory(root / "old", b"x")
        store.rename(str(root / "old"), str(root / "new"))
        assert (root / "new" / "file").read_bytes() == b"x" and not (root / "old").exists()
        (root / "empty").mkdir()
        store.rename(str(root / "new"), str(root / "empty"))
        assert (root / "empty" / "file").read_bytes() == b"x" and not (root / "new").exists()
        store.rename(str(root / "empty" / "file"), str(root / "file"))
        assert (root / "file").read_bytes() == b"x"
        with raises(errno.ENOENT, root / "none", root / "x"):
            store.rename(str(root / "none"), str(root / "x"))

    def test_rename_does_not_replace_a_full_directory(self, root: Path) -> None:
        directory(root / "a", b"x")
        directory(root / "b", b"y")
        with raises((errno.ENOTEMPTY, errno.EEXIST), root / "a", root / "b"):
            self.make_store().rename(str(root / "a"), str(root / "b"))
        assert [(root / name / "file").read_bytes() for name in "ab"] == [b"x", b"y"]

    def test_exchange(self, root: Path) -> None:
        """Either it swaps, or it says ENOTSUP and leaves both alone."""
        directory(root / "a", b"x")
        directory(root / "b", b"y")
        swapped = self._exchanged(root / "a", root / "b", (errno.ENOTSUP,))
        assert [(root / name / "file").read_bytes() for name in "ab"] == ([b"y", b"x"] if swapped else [b"x", b"y"])
        assert len(list(root.iterdir())) == 2

    def test_exchange_with_nothing(self, root: Path) -> None:
        directory(root / "a", b"x")
        for one, other in (("a", "none"), ("none", "a")):
            assert not self._exchanged(root / one, root / other, (errno.ENOENT, errno.ENOTSUP))
            assert [path.name for path in root.iterdir()] == ["a"]

    def _exchanged(self, one: Path, other: Path, expected: tuple[int, ...]) -> bool:
        try:
            self.make_store().exchange(str(one), str(other))
        except OSError as error:
            assert error.errno in expected, error
            assert names(error, one, other), f"{error!r} names neither {one} nor {other}"
            return False
        return True

    def test_remove_file(self, root: Path) -> None:
        store = self.make_store()
        written(store, root / "a", b"x")
        (root / "link").symlink_to(root / "a")
        store.remove_file(str(root / "link"))
        assert [path.name for path in root.iterdir()] == ["a"]
        store.remove_file(str(root / "a"))
        with raises(errno.ENOENT, root / "a"):
            store.remove_file(str(root / "a"))
        (root / "d").mkdir()
        with raises((errno.EISDIR, errno.EPERM), root / "d"):
            store.remove_file(str(root / "d"))

    def test_remove_directory(self, root: Path) -> None:
        store = self.make_store()
        directory(root / "d", b"x")
        (root / "link").symlink_to(root / "d")
        with raises((errno.ENOTEMPTY, errno.EEXIST), root / "d"):
            store.remove_directory(str(root / "d"))
        with raises(errno.ENOTDIR, root / "link"):
            store.remove_directory(str(root / "link"))
        assert (root / "d" / "file").read_bytes() == b"x"
        (root / "d" / "file").unlink()
        store.remove_directory(str(root / "d"))
        with raises(errno.ENOENT, root / "d"):
            store.remove_directory(str(root / "d"))

    def _syncs(self, monkeypatch: pytest.MonkeyPatch) -> Syncs:
        if not self.syncs_through_python:
            pytest.skip("the store does not sync through Python")
        return Syncs(monkeypatch.setattr)


# ---- what the tests are made of --------------------------------------------------------------------------------------


def written(store: Store, path: Path, data: bytes, *, reserved: int | None = None, size: int | None = None) -> Path:
    """A finished file that was given `data` in one write."""
    descriptor = store.create(str(path), len(data) if reserved is None else reserved)
    store.write(descriptor, memoryview(data), 0)
    store.finish(descriptor, len(data) if size is None else size)
    return path


def directory(path: Path, content: bytes) -> None:
    path.mkdir()
    (path / "file").write_bytes(content)


def in_memory(size: int, shift: int, seed: int = 0) -> memoryview:
    """Bytes that differ from place to place, `shift` bytes beyond an address that direct I/O takes."""
    block = mmap.mmap(-1, size + shift + 1)
    assert ctypes.addressof(ctypes.c_char.from_buffer(block)) % ALIGN_BYTES == 0
    data = memoryview(block)[shift : shift + size]
    pattern = bytes((number * 7 + seed * 31) % 251 for number in range(251))
    data[:] = (pattern * (size // 251 + 1))[:size]
    return data


def in_threads(work: list[Callable[[], Any]]) -> None:
    errors: list[BaseException] = []

    def run(one: Callable[[], Any]) -> None:
        try:
            one()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def raises(number: int | tuple[int, ...], *paths: Path) -> Iterator[None]:
    """An OSError of that number which names one of the paths."""
    numbers = (number,) if isinstance(number, int) else number
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno in numbers, f"{caught.value!r} instead of {[errno.errorcode[n] for n in numbers]}"
    assert names(caught.value, *paths), f"{caught.value!r} names none of {paths}"


def names(error: OSError, *paths: Path) -> bool:
    return any(str(path) in (error.filename, error.filename2) for path in paths)


@contextmanager
def small_disk_or_skip(place: Path, size: int) -> Iterator[Path]:
    with _or_skip(lambda: small_disk(place, size), "a small disk") as disk:
        yield disk


@contextmanager
def power_or_skip(place: Path) -> Iterator[Disk]:
    @contextmanager
    def mounted() -> Iterator[Disk]:
        disk = Disk(place)
        try:
            yield disk
        finally:
            disk.close()

    with _or_skip(mounted, "a disk to cut the power of") as disk:
        yield disk


@contextmanager
def _or_skip(make: Callable[[], Any], what: str) -> Iterator[Any]:
    making = make()
    try:
        made = making.__enter__()
    except OSError as error:
        pytest.skip(f"{what} needs the right to mount: {error}")
    try:
        yield made
    finally:
        making.__exit__(None, None, None)
