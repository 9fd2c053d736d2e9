"""Saves of several ranks, which are threads here: what is written, linked and agreed, and how failures are told."""

from __future__ import annotations

import contextlib
import errno
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xxhash

from milepost import Checkpointer, PerRank
from milepost.engine.agreement import AgreedSearch
from milepost.engine.reader import StoredCheckpoint
from milepost.engine.retention import KeepNewest
from milepost.engine.votes import Meeting, Ranks
from milepost.errors import CheckpointSaveError, UnencodableValueError
from milepost.format.codec import PartsRef
from milepost.format.parts import parted
from milepost.testing.faulty_store import Fault, FaultyStore


def together(
    count: int, act: Callable[[int, Ranks], Any], deadline: float = 20.0, store: Any = None
) -> tuple[list[Any], Any]:
    """Run `act` as each of several ranks; what each returned or raised, and the store."""
    store = dist.HashStore() if store is None else store
    ends: list[Any] = [None] * count

    def run(rank: int) -> None:
        try:
            ends[rank] = act(rank, Ranks(store, rank, count, deadline_seconds=deadline))
        except BaseException as error:
            ends[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return ends, store


def raised(ends: list[Any]) -> list[Any]:
    for end in ends:
        if isinstance(end, BaseException):
            raise end
    return ends


def state(rank: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)  # the ranks are threads: the global one is drawn from by all
    return {
        "model": {
            "big": torch.randn(900, 700, generator=draw),
            "last": torch.randn(64, 3, 5, 5, generator=draw).contiguous(memory_format=torch.channels_last),
            "wide": torch.randn(300, 300, dtype=torch.complex128, generator=draw),
            "steps": torch.arange(7),
            "none": torch.empty(0, 4),
        },
        "own": PerRank({"rank": rank, "position": torch.full((3,), rank)}),
        "lr": 0.5,
    }


def read(path: Path) -> tuple[dict[str, Any], list[list[Any]]]:
    """Tree and trees of the ranks, with the tensors as arrays, by way of the indexes alone."""
    with StoredCheckpoint(path) as stored:

        def rows(blob: int, row: int) -> np.ndarray[Any, Any]:
            index = stored.index(blob)
            entry = index.entry(row)
            data = np.fromfile(path / stored.head.blobs[blob].name, np.uint8)[entry.start : entry.stop]
            kinds = {"F32": np.float32, "I64": np.int64, "U8": np.complex128}
            found = data.view(kinds[entry.dtype])
            stride = index.strides.get(str(row))
            if stride is None:
                return found.reshape(index.shape(row))
            return (
                torch.empty_strided(index.shape(row), stride)
                .copy_(torch.from_numpy(found.reshape(index.shape(row))))
                .numpy()
            )

        def value(node: Any) -> Any:
            if isinstance(node, PartsRef):
                whole = parted(node, stored.index, "c")
                made = np.full(whole.shape, 7, np.float32 if whole.dtype == "F32" else np.complex128)
                for ref, box in whole.parts:
                    made[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))] = rows(*ref)
                return made
            if isinstance(node, tuple) and hasattr(node, "row"):
                return rows(*node)
            return {key: value(item) for key, item in node.items()} if isinstance(node, dict) else node

        trees = [[value(item) for item in stored.rank_tree(n)] for n in range(len(stored.head.rank_trees()))]
        return value(stored.tree), trees


@pytest.mark.parametrize("count", [2, 4])
def test_written_once_and_balanced_and_each_ranks_own(tmp_path: Path, count: int) -> None:
    def act(rank: int, ranks: Ranks) -> None:
        with Checkpointer(tmp_path, ranks=ranks, threads=1) as c:
            c.save(1, state(rank))

    _, store = together(count, act)
    found, trees = read(tmp_path / "step-00000001")
    saved = state()["model"]
    for name, tensor in saved.items():
        assert np.array_equal(found["model"][name], tensor.numpy()), name
    assert [tree[0]["rank"] for tree in trees] == list(range(count)) and found["lr"] == 0.5
    assert all(tree[0]["position"].tolist() == [rank] * 3 for rank, tree in enumerate(trees))
    with StoredCheckpoint(tmp_path / "step-00000001") as stored:
        sizes = [sum(b.bytes for b in stored.head.blobs if b.rank == rank) for rank in range(count)]
        assert stored.head.world_size == count
    total = sum(t.numel() * t.element_size() for t in saved.values())
    assert total < sum(sizes) < total + count * 2000, "each byte is written once"
    assert max(sizes) <= 1.05 * sum(sizes) / count
    assert store.num_keys() <= 1, "only the count of ranks stays in the store"


def test_each_rank_links_what_has_not_changed_and_writes_a_delta(tmp_path: Path) -> None:
    def act(rank: int, ranks: Ranks) -> None:
        live = state(rank)
        with Checkpointer(tmp_path, ranks=ranks, threads=1) as c:
            c.save(1, live)
            c.save(2, live)
            live["model"]["steps"] += 1
            c.save(3, live)

    raised(together(3, act)[0])
    one, two, three = (tmp_path / f"step-0000000{n}" for n in (1, 2, 3))
    for path in one.glob("*.safetensors"):
        assert (two / path.name).stat().st_ino == path.stat().st_ino
    deltas = list(three.glob("*-00002-of-00002.safetensors"))
    assert len(deltas) == 1 and deltas[0].stat().st_size < 1000
    found, _ = read(three)
    assert found["model"]["steps"].tolist() == list(range(1, 8))
    assert np.array_equal(found["model"]["big"], state()["model"]["big"].numpy())


def test_one_rank_alone_writes_what_it_wrote_without_ranks(tmp_path: Path) -> None:
    """A value that would be each rank's own stands for itself."""
    live = state()
    with Checkpointer(tmp_path / "a", background=False) as c:
        c.save(1, live)
    with Checkpointer(tmp_path / "b", background=False) as c:
        c.save(1, {**live, "own": live["own"].value})
    for path in (tmp_path / "a" / "step-00000001").iterdir():
        if path.name != "manifest.json":
            assert path.read_bytes() == (tmp_path / "b" / "step-00000001" / path.name).read_bytes()
    head = json.loads((tmp_path / "a" / "step-00000001" / "manifest.json").read_bytes())
    assert not {"trees", "listing"} & set(head) and "rank" not in head["blobs"][0]


def test_what_has_no_room_in_the_head_is_listed_beside_it(tmp_path: Path) -> None:
    def act(rank: int, ranks: Ranks) -> None:
        with Checkpointer(tmp_path, ranks=ranks, threads=1, background=False) as c:
            c.save(1, {"model": torch.arange(100.0), "own": PerRank(torch.full((2,), rank))})

    raised(together(24, act)[0])
    path = tmp_path / "step-00000001"
    assert (path / "manifest.json").stat().st_size <= 8192 and (path / "blobs.json").exists()
    found, trees = read(path)
    assert found["model"].tolist() == list(range(100)) and [int(t[0][0]) for t in trees] == list(range(24))


@pytest.mark.parametrize(("failing", "background"), [(0, False), (1, True)])
def test_no_space_on_one_rank_fails_the_save_on_all_with_its_cause(
    tmp_path: Path, failing: int, background: bool
) -> None:
    def act(rank: int, ranks: Ranks, at: int | None = None) -> int:
        faulty = FaultyStore()
        with Checkpointer(tmp_path, ranks=ranks, threads=1, store=faulty, background=background) as c:
            c.save(1, state(rank), wait=True)
            before = len(faulty.calls)
            faulty.fault = (
                Fault(before + at, errno.ENOSPC, lasting=True) if at is not None and rank == failing else None
            )
            live = state(rank)
            live["model"]["big"] += 1
            c.save(2, live, wait=True)
            return len(faulty.calls) - before

    calls = raised(together(2, act)[0])[failing]
    for at in range(calls):
        ends, store = together(2, lambda rank, ranks, at=at: act(rank, ranks, at))
        for rank, end in enumerate(ends):
            if isinstance(end, CheckpointSaveError):
                assert end.rank == failing and "No space left" in str(end), (at, rank, end)
                assert end.step == 2
        failed = [isinstance(end, CheckpointSaveError) for end in ends]
        assert all(failed) or not any(failed), (at, ends)
        read(tmp_path / "step-00000001")
        assert store.num_keys() <= 1
    raised(together(2, act)[0])
    # a directory that was taken away while another rank still wrote into it has been swept by the next save
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_state_that_differs_is_refused_on_all_with_the_names(tmp_path: Path) -> None:
    def act(rank: int, ranks: Ranks) -> None:
        with Checkpointer(tmp_path, ranks=ranks, threads=1) as c:
            c.save(1, {"model": {"a": torch.zeros(2), f"b{rank}": torch.zeros(3)}}, wait=True)

    ends, _ = together(2, act)
    for end in ends:
        assert isinstance(end, CheckpointSaveError) and "it lacks 'b0'; it alone has 'b1'" in str(end) and end.rank == 1
    assert not list(tmp_path.glob("step*"))


def test_values_of_each_rank_at_other_places_are_refused_with_their_places(tmp_path: Path) -> None:
    """The tree refers to them by number: two ranks that number them otherwise would get each other's."""

    def act(rank: int, ranks: Ranks) -> None:
        own = {f"seed{rank}": PerRank(rank), "position": PerRank(7)}
        with Checkpointer(tmp_path, ranks=ranks, threads=1) as c:
            c.save(1, {"model": torch.zeros(2), "own": own}, wait=True)

    ends, _ = together(2, act)
    for end in ends:
        assert isinstance(end, CheckpointSaveError) and "it lacks the PerRank value 'own.seed0'" in str(end)
    assert not list(tmp_path.glob("step*"))


def test_a_kept_plan_is_not_used_for_other_values_of_each_rank(tmp_path: Path) -> None:
    """Values without tensors leave no trace among the tensors, but the plan says which there are."""

    def act(rank: int, ranks: Ranks) -> None:
        model = torch.zeros(2)
        with Checkpointer(tmp_path, ranks=ranks, threads=1) as c:
            c.save(1, {"model": model})
            c.save(2, {"model": model, "position": PerRank(7 + rank)})
            c.save(3, {"model": model, "a": PerRank(rank), "position": PerRank(9)})

    raised(together(2, act)[0])
    trees = [read(tmp_path / f"step-0000000{step}")[1] for step in (2, 3)]
    assert trees == [[[7], [8]], [[0, 9], [1, 9]]]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_value_that_is_no_data_on_one_rank_is_told_to_the_other(tmp_path: Path, failing: int) -> None:
    def act(rank: int, ranks: Ranks) -> None:
        value = object() if rank == failing else 1
        with Checkpointer(tmp_path, ranks=ranks, threads=1) as c:
            c.save(1, {"model": torch.zeros(2), "odd": PerRank(value)}, wait=True)

    ends, _ = together(2, act)
    assert isinstance(ends[failing], UnencodableValueError)
    other = ends[1 - failing]
    assert isinstance(other, CheckpointSaveError) and other.rank == failing and "builtins.object" in str(other)
    assert not list(tmp_path.glob("step*"))


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_rank_that_does_not_come_is_named_after_the_deadline(tmp_path: Path, missing: int) -> None:
    def act(rank: int, ranks: Ranks) -> None:
        if rank != missing:
            with Checkpointer(tmp_path, ranks=ranks, threads=1) as c:
                c.save(1, state(rank), wait=True)

    ends, _ = together(3, act, deadline=1.0)
    for rank in {0, 1, 2} - {missing}:
        assert isinstance(ends[rank], CheckpointSaveError) and ends[rank].rank == missing, ends
        assert "has not come to this save for 1 s" in str(ends[rank])
    assert not list(tmp_path.iterdir())


def test_ranks_that_are_started_again_do_not_find_what_dead_ones_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun keeps one store for all starts. In the first one, one of two ranks has died before its first save."""

    def act(rank: int, ranks: Ranks) -> None:
        with Checkpointer(tmp_path, ranks=ranks, threads=1) as c:
            c.save(1, state(rank), wait=True)

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    ends, store = together(2, lambda rank, ranks: act(rank, ranks) if rank == 0 else None, deadline=0.5)
    assert isinstance(ends[0], CheckpointSaveError)
    assert store.num_keys() > 1, "what it said is still there"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    raised(together(2, act, store=store)[0])
    read(tmp_path / "step-00000001")


def test_skipping_is_decided_by_the_first_rank(tmp_path: Path) -> None:
    """The others skip what it skips, whether they are busy or not; nobody waits for a save that not all make."""
    meet = threading.Barrier(2)
    hold = threading.Event()

    class Slow(FaultyStore):
        def create(self, path: str, size: int) -> int:
            hold.wait(20)
            return super().create(path, size)

    def act(rank: int, ranks: Ranks) -> list[bool]:
        with Checkpointer(tmp_path, ranks=ranks, threads=1, on_busy="skip", store=Slow()) as c:
            first = c.save(1, state(rank))
            skipped = c.save(2, state(rank)) is first
            meet.wait(20)
            hold.set()
            first.result()
            third = c.save(3, state(rank))
            third.result()
            return [skipped, third is first]

    ends, _ = together(2, act)
    assert raised(ends) == [[True, False]] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_rank_whose_first_save_failed_skips_what_the_first_rank_skips(tmp_path: Path) -> None:
    """It has nothing under way, but would save alone, and wait for the others in vain."""
    hold, skipped = threading.Event(), threading.Barrier(2)

    class Slow(FaultyStore):
        def create(self, path: str, size: int) -> int:
            hold.wait(20)
            return super().create(path, size)

    def act(rank: int, ranks: Ranks) -> str:
        c = Checkpointer(tmp_path, ranks=ranks, threads=1, on_busy="skip", store=Slow() if rank == 0 else None)
        live = {"model": torch.zeros(2), "odd": PerRank(object() if rank else 1)}
        with contextlib.suppress(UnencodableValueError):
            c.save(1, live)
        second = c.save(2, live | {"odd": PerRank(1)})
        skipped.wait(20)
        hold.set()
        with pytest.raises(UnencodableValueError if rank else CheckpointSaveError):
            second.result()
        c.save(3, live | {"odd": PerRank(1)}, wait=True)
        c.close()
        return str(second.path).rpartition("-")[2]

    assert raised(together(2, act)[0]) == ["00000001"] * 2
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000003"]


def test_the_first_rank_shows_that_it_gets_on_while_it_lists_the_steps() -> None:
    """A sweep that takes longer than the deadline would else fail the restore on all ranks."""
    meetings: list[Meeting] = []
    shared = dist.HashStore()

    class Seen(Ranks):
        def meeting(self, what: str) -> Meeting:
            meetings.append(super().meeting(what))
            return meetings[-1]

    def steps() -> list[int]:
        until = time.monotonic() + 10
        while not meetings[0].progress_of(0) and time.monotonic() < until:
            pass
        assert meetings[0].progress_of(0), "nobody saw it get on"
        return [3]

    def act(rank: int, _: Ranks) -> int:
        return AgreedSearch(Seen(shared, rank, 2), "runs", steps, time.monotonic_ns).run(lambda step: "")

    assert raised(together(2, act)[0]) == [3, 3]


def test_retention_that_fails_on_the_first_rank_is_a_warning(tmp_path: Path) -> None:
    """The checkpoint is committed for all ranks: none of them may say that its save has failed."""

    class Refusing(FaultyStore):
        def rename(self, source: str, target: str) -> None:
            if source.endswith("/step-00000001"):
                raise PermissionError(errno.EACCES, "not yours", source)
            super().rename(source, target)

    def act(rank: int, ranks: Ranks) -> None:
        with Checkpointer(tmp_path, ranks=ranks, threads=1, keep=KeepNewest(1), store=Refusing()) as c:
            for step in (1, 2):
                c.save(step, state(rank), wait=True)

    with pytest.warns(UserWarning, match=r"step 2 is committed at .*PermissionError"):
        raised(together(2, act)[0])
    assert len(list(tmp_path.glob("step-*"))) == 2


def test_what_one_rank_writes_stays_as_it_was(tmp_path: Path) -> None:
    """Digests of the files as they were before ranks could save together; the head, which bears the time, apart."""
    live = {
        "model": {"w": torch.arange(600_000.0).reshape(600, 1000), "b": torch.arange(7)},
        "extra": {"c": torch.zeros(3, dtype=torch.complex128), "n": (1, {2: b"x"}), "lr": float("inf")},
        "images": torch.arange(120.0).reshape(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    }
    with Checkpointer(tmp_path, background=False, ranks=None) as c:
        c.save(1, live)
    files = {path.name: path.read_bytes() for path in sorted((tmp_path / "step-00000001").iterdir())}
    del files["manifest.json"]
    assert {name: xxhash.xxh3_64_hexdigest(data) for name, data in files.items()} == DIGESTS


DIGESTS = {
    "model.index.json": "7fa15b7752ab326c",
    "model.safetensors": "22a6ad76126e4afd",
    "rest.index.json": "1e629f9296d8d672",
    "rest.safetensors": "b6f0a73d0eb28e4d",
    "tree.json": "9188b81e90014b0b",
}


def test_values_of_each_rank_with_the_same_dotted_name_keep_their_own_bytes(tmp_path: Path) -> None:
    def act(rank: int, ranks: Ranks) -> None:
        mine = {"a": PerRank({"b.c": torch.full((2,), rank)}), "a.b": PerRank({"c": torch.full((2,), 10 + rank)})}
        shared = {"x": {"y.z": torch.ones(2)}, "x.y": {"z": torch.zeros(2)}}
        with Checkpointer(tmp_path, ranks=ranks, threads=1) as c:
            c.save(1, {"model": {"w": torch.ones(3)}, **mine, **shared})

    raised(together(2, act)[0])
    found, trees = read(tmp_path / "step-00000001")
    assert found["x"]["y.z"].tolist() == [1, 1] and found["x.y"]["z"].tolist() == [0, 0]
    for rank, (first, second) in enumerate(trees):
        assert first["b.c"].tolist() == [rank] * 2 and second["c"].tolist() == [10 + rank] * 2
