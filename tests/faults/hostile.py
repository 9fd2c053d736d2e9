"""Checkpoint directories as somebody might forge them: every digest is right, and what they cover is not.

As a command, ``python tests/faults/hostile.py``, it tries ten thousand mutations of a directory's files.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import resource
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import xxhash
from torch import nn

from milepost import Checkpointer, PerRank
from milepost.engine.votes import Ranks
from milepost.errors import MilepostError

SPICE = [
    0, -1, 1, 2, 2**31, 2**53, 2**62, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, "", "a", "..", "../x", "/etc/passwd",
    "manifest.json", "tree.json", "model.safetensors", "\0", "nan", "$", "v", "tensor", "value", "dict", "F32", "U8",
    None, True, False, [], {}, [[]], [0], [0, 0], [0, 99], [9, 0], [2**40, 2**40], {"$": "tensor", "v": [0, 0]},
    {"$": "tensor", "v": [7, 7]}, {"$": "value", "v": {"type": "bytearray", "value": 2**40}},
    {"$": "value", "v": {"type": "range", "value": [0, 2**70, 1]}}, {"$": "bytes", "v": "####"},
    {"$": "value", "v": {"type": "torch.dtype", "value": "_dynamo"}},
    {"$": "value", "v": {"type": "enum", "class": "os:environ", "value": ["x"]}},
    {"$": "value", "v": {"type": "pickle", "path": "x", "value": {"$": "bytes", "v": "Y29zCnN5c3RlbQou"}}},
    {"$": "parts", "v": [[0, 1], [0, 0]]}, {"$": "parts", "v": [[0], 0]}, {"$": "parts", "v": [[0, 0], [0, 1]]},
    {"$": "ranks", "v": 0}, {"$": "ranks", "v": 9}, ["w", [2**40, 4], [0, 0]],
    {"$": "parted", "v": ["dict", ["a"], [[0, 1]], [0], [0]]},
    {"$": "dict", "v": [[{"$": "tuple", "v": []}, 1]]}, {"$": "float", "v": "inf"}, {"$": "?", "v": 1}, {"$": 1},
]  # fmt: skip
WATCHED = ("import", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "socket.",
           "shutil.", "os.remove", "os.rename", "os.mkdir", "os.symlink", "pickle.")  # fmt: skip


class Watch:
    """Notes what the interpreter says of code, processes and files while it is on."""

    on: ClassVar[bool] = False
    seen: ClassVar[list[Any]] = []
    outside: ClassVar[str] = ""

    @classmethod
    def hook(cls, event: str, given: Any) -> None:
        if cls.on and event.startswith(WATCHED):
            cls.seen.append((event, given))
        opened = event == "open" and isinstance(given[0], str)
        if cls.on and opened and given[0].startswith("/") and not given[0].startswith((cls.outside, "/proc/self/fd/")):
            cls.seen.append((event, given))


sys.addaudithook(Watch.hook)


def live() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "extra": {"big": torch.arange(3000.0), "other": torch.zeros(3, dtype=torch.complex128), "n": (1, {2: b"x"})},
        "images": torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    }


def genuine(directory: Path) -> dict[str, bytes]:
    """A checkpoint of step 1, as the bytes of its files."""
    with Checkpointer(directory, background=False, threads=1) as c:
        c.save(1, live(), {"loss": 0.5})
        c.restore(live())  # what is made at the first use is not the file's doing
        c.load(1)
    return {path.name: path.read_bytes() for path in sorted((directory / "step-00000001").iterdir())}


def genuine_of_ranks(directory: Path) -> dict[str, bytes]:
    """One that two ranks saved, which are threads here: parts of tensors, and values of each."""
    store, ends = dist.HashStore(), []
    state = {**live(), "wide": torch.arange(60_000.0).reshape(200, 300)}

    def save(rank: int) -> None:
        ranks = Ranks(store, rank, 2)
        with Checkpointer(directory, background=False, threads=1, ranks=ranks) as c:
            c.save(1, {**state, "own": PerRank({"rank": rank, "seen": torch.full((3,), rank)})}, {"loss": 0.5})
        ends.append(rank)

    threads = [threading.Thread(target=save, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == [0, 1]
    files = {path.name: path.read_bytes() for path in sorted((directory / "step-00000001").iterdir())}
    lay_out(listed(files), directory)
    with Checkpointer(directory, threads=1) as c:
        c.restore(live())  # what is made at the first use is not the file's doing
        c.load(1)
    return files


def listed(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same, with what the head lists in a file beside it, as where it has no room for that."""
    head = head_of(files)
    listing = encoded({"version": 1, **{key: head[key] for key in ("blobs", "maps", "trees")}})
    del head["trees"]
    head.update(blobs=[], maps=[], listing={"name": "blobs.json", "bytes": len(listing), "xxh3_128": digest(listing)})
    return with_head({**files, "blobs.json": listing}, encoded(head))


def digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def with_head(files: dict[str, bytes], head: bytes) -> dict[str, bytes]:
    """`head` is the text of the head without its digest: the digest is put right."""
    body = head.rstrip()[:-1]
    return {**files, "manifest.json": body + b',"xxh3_128":"' + digest(body).encode() + b'"}\n'}


def head_of(files: dict[str, bytes]) -> dict[str, Any]:
    head: dict[str, Any] = json.loads(files["manifest.json"])
    del head["xxh3_128"]
    return head


def encoded(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def forged(files: dict[str, bytes], name: str, data: bytes) -> dict[str, bytes]:
    """The directory with another file `name`, and every digest that covers it right again."""
    if name == "manifest.json":
        return with_head(files, data)
    head = head_of(files)
    files = {**files, name: data}
    stored = [head["tree"], *head["maps"], *head.get("trees", []), *(blob["index"] for blob in head["blobs"])]
    if "listing" in head:
        if name != "blobs.json":
            listing = json.loads(files["blobs.json"])
            stored += [*listing["maps"], *listing["trees"], *(blob["index"] for blob in listing["blobs"])]
            _put_right(stored, name, data)
            files["blobs.json"] = encoded(listing)
        head["listing"].update(bytes=len(files["blobs.json"]), xxh3_128=digest(files["blobs.json"]))
    _put_right(stored, name, data)
    return with_head(files, encoded(head))


def _put_right(listed: list[dict[str, Any]], name: str, data: bytes) -> None:
    for stored in listed:
        if stored["name"] == name:
            stored.update(bytes=len(data), xxh3_128=digest(data))


def lay_out(files: dict[str, bytes], directory: Path) -> None:
    path = directory / "step-00000001"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)


def try_all(directory: Path) -> collections.Counter[str]:
    """Read it in each way there is: an error of Milepost's or a state, and nothing of the file is run."""
    ends: collections.Counter[str] = collections.Counter()
    with Checkpointer(directory, threads=1) as c, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target = live()
        ways: list[Callable[[], Any]] = [lambda: c.load(1), lambda: c.restore(target, 1), lambda: c.verify(1)]
        for way in ways:
            Watch.outside, Watch.seen[:] = str(directory), []
            Watch.on = True
            try:
                way()
                ends["read"] += 1
            except MilepostError as error:
                ends[type(error).__name__] += 1
            finally:
                Watch.on = False
            assert Watch.seen == [], Watch.seen
    return ends


def mutated(value: Any, draw: random.Random) -> Any:
    """A copy with one node exchanged, dropped, doubled or wrapped."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(sorted(value, key=str))
        if draw.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if draw.random() < 0.1:
            return {**value, str(draw.choice(SPICE)): draw.choice(SPICE)}
        return {**value, key: mutated(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.85:
        at = draw.randrange(len(value))
        if draw.random() < 0.1:
            return value[:at] + value[at + 1 :]
        if draw.random() < 0.1:
            return value[: at + 1] + value[at:]
        return [*value[:at], mutated(value[at], draw), *value[at + 1 :]]
    if type(value) is int and draw.random() < 0.4:
        return value + draw.choice([-1, 1, 8, 64, -64, 2**20, 2**40])
    return draw.choice(SPICE)


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    at, other = sorted((draw.randrange(len(data)), draw.randrange(len(data))))
    kind = draw.randrange(5)
    if kind == 0:
        return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + data[other:]
    if kind == 2:
        return data[:other] + data[at:]
    if kind == 3:
        return (
            data[:at]
            + draw.choice([b"[" * 500, b'{"a":' * 300, b'"', b"\\", b"\xff", b"\\ud800", b"1e999"])
            + data[at:]
        )
    return data[:at] + bytes(other - at) + data[other:]


def mutation(files: dict[str, bytes], draw: random.Random) -> tuple[str, dict[str, bytes]]:
    name = draw.choice([name for name in files if name.endswith(".json")])
    if draw.random() < 0.3:
        body = encoded(head_of(files)) if name == "manifest.json" else files[name]
        return name, forged(files, name, mutate_bytes(body, draw))
    tree = head_of(files) if name == "manifest.json" else json.loads(files[name])
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        tree = mutated(tree, draw)
    return name, forged(files, name, encoded(tree))


def mutations(directory: Path, count: int, seed: int = 0) -> collections.Counter[str]:
    """Of a checkpoint of one rank, of one of two, and of that with its listing apart, in turn."""
    of_ranks = genuine_of_ranks(directory / "of ranks")
    kinds, draw = [genuine(directory / "genuine"), of_ranks, listed(of_ranks)], random.Random(seed)
    ends: collections.Counter[str] = collections.Counter()
    for number in range(count):
        name, made = mutation(kinds[number % 3], draw)
        lay_out(made, directory / "forged")
        try:
            ends += try_all(directory / "forged")
        except BaseException as error:
            error.add_note(f"mutation {number} of seed {seed}, of {name}: {made[name][:3000]!r}")
            raise
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="milepost-"))
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends = mutations(directory, given.count, given.seed)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    shutil.rmtree(directory)
    print(f"{given.count} mutations, each read in three ways, in {time.monotonic() - begun:.0f} s: {dict(ends)}.")
    print(f"No other error, no code run, no file outside opened; peak memory grew by {grown} MB.")


if __name__ == "__main__":
    sys.exit(main())
