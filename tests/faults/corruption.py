"""Damage to checkpoints of both forms: flipped bits, zeroed pages, truncations, swapped and missing files.

As a command, ``python tests/faults/corruption.py``, it damages ten thousand times, and loads a thousand sound ones.
"""

from __future__ import annotations

import argparse
import collections
import random
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from crash_scenarios import memory_directory, same

from milepost import Checkpointer
from milepost.errors import CheckpointCorruptError, CheckpointError
from milepost.plugins.io import TorchCheckpointIO

KINDS = ("bit", "page", "cut", "longer", "swapped", "missing")
PAGE_BYTES = 4096


class Damage(NamedTuple):
    """What was done to a file; `at` is a byte that differs, if there is one."""

    kind: str
    path: Path
    at: int | None


def state(step: int) -> dict[str, Any]:
    """A model of three pieces, of which the middle changes from step to step, and small things beside it."""
    torch.manual_seed(step)
    frozen = torch.arange(400_000.0).sin()
    return {
        "model": {"a": frozen, "trained": torch.randn(90_000), "b": frozen.flip(0), "empty": torch.empty(0)},
        "optimizer": {"moments": torch.randn(70_000), "groups": [{"lr": 0.1 * step, "params": [0, 1]}]},
        "step": step,
        "note": "x" * 300,
    }


def damaged_bytes(data: bytes, kind: str, other: bytes, draw: random.Random) -> tuple[bytes, int | None]:
    at = draw.randrange(len(data))
    if kind == "bit":
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :], at
    if kind == "page":
        start = at // PAGE_BYTES * PAGE_BYTES
        stop = min(start + PAGE_BYTES, len(data))
        changed = next((n for n in range(start, stop) if data[n]), None)
        return data[:start] + bytes(stop - start) + data[stop:], changed
    if kind == "cut":
        return data[:at], at
    if kind == "longer":
        return data + draw.randbytes(1 + at % 100), len(data)
    return other, next((n for n, (a, b) in enumerate(zip(data, other, strict=False)) if a != b), None)


class Form:
    """A directory of checkpoints of one form, and how it is read. Step 2 is damaged, step 1 stays as it is."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.make()
        self.files = {path: path.read_bytes() for path in self.paths()}

    def make(self) -> None:
        raise NotImplementedError

    def paths(self) -> list[Path]:
        raise NotImplementedError

    def verify(self) -> None:
        raise NotImplementedError

    def load(self) -> Any:
        raise NotImplementedError

    def damage(self, kind: str, draw: random.Random) -> Damage | None:
        """Do it; None where it would leave the file as it is."""
        path = draw.choice(sorted(self.files))
        data = self.files[path]
        others = sorted(other for other in self.files if other != path) or [path]
        made, at = damaged_bytes(data, kind, self.files[draw.choice(others)], draw)
        if kind == "missing":
            path.unlink()
            return Damage(kind, path, None)
        if made == data:
            return None
        self._put(path, made)
        return Damage(kind, path, at)

    def mend(self, damage: Damage) -> None:
        self._put(damage.path, self.files[damage.path])

    def _put(self, path: Path, data: bytes) -> None:
        path.unlink(missing_ok=True)  # the other names of a linked file keep theirs
        path.write_bytes(data)


class Directory(Form):
    def make(self) -> None:
        self.checkpointer = Checkpointer(self.root, background=False, threads=1)
        for step in (1, 2):
            self.checkpointer.save(step, state(step))

    def paths(self) -> list[Path]:
        return sorted((self.root / "step-00000002").iterdir())

    def verify(self) -> None:
        self.checkpointer.verify(2)

    def load(self) -> Any:
        return self.checkpointer.load(2)

    def restored(self) -> tuple[int, list[str]]:
        """Which step a resume goes on from, and what it says."""
        live = state(0)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            step = self.checkpointer.restore(live)
        assert same(live, state(step))
        return step, [str(warning.message) for warning in told]


class File(Form):
    def make(self) -> None:
        self.io = TorchCheckpointIO()
        for step in (1, 2):
            self.io.save_checkpoint(state(step), self.root / f"{step}.ckpt")
        self.other = (self.root / "1.ckpt").read_bytes()

    def paths(self) -> list[Path]:
        return [self.root / "2.ckpt"]

    def verify(self) -> None:
        self.io.verify(self.root / "2.ckpt")

    def load(self) -> Any:
        return self.io.load_checkpoint(self.root / "2.ckpt")

    def damage(self, kind: str, draw: random.Random) -> Damage | None:
        """Another whole file is no damage that a file alone could show: half of another one is."""
        path = self.root / "2.ckpt"
        if kind != "swapped":
            return super().damage(kind, draw)
        data, at = self.files[path], draw.randrange(len(self.other))
        made = data[:at] + self.other[at:] if draw.random() < 0.5 else self.other[:at] + data[at:]
        if made in (data, self.other):
            return None
        self._put(path, made)
        return Damage(kind, path, None)


def check(form: Form, damage: Damage) -> None:
    """It is found by a verification, and named; a load finds it or gives what was saved."""
    try:
        form.verify()
    except CheckpointError as error:
        assert damage.path.name in str(error), error
        if isinstance(error, CheckpointCorruptError) and damage.kind in ("bit", "page"):
            assert error.byte_range is not None and damage.at is not None
            assert error.byte_range[0] <= damage.at < error.byte_range[1], (error, damage)
            if damage.path.suffix == ".safetensors" and damage.at > PAGE_BYTES:
                assert error.tensor is not None
    else:
        raise AssertionError("not found")
    try:
        loaded = form.load()
    except CheckpointError as error:
        assert damage.path.name in str(error) or damage.path.parent.name in str(error), error
    else:
        assert same(loaded, state(2)), "a load gave something else"
    if isinstance(form, Directory) and damage.kind in ("bit", "missing") and damage.path.name != "manifest.json":
        step, told = form.restored()
        assert step == 2 or (step == 1 and len(told) == 1 and damage.path.name in told[0]), (step, told)


def trials(form: Form, count: int, seed: int = 0) -> collections.Counter[str]:
    draw = random.Random(seed)
    done: collections.Counter[str] = collections.Counter()
    while done.total() < count:
        kind = draw.choices(KINDS, weights=(6, 2, 2, 1, 1, 1))[0]
        damage = form.damage(kind, draw)
        if damage is None:
            continue
        try:
            check(form, damage)
        except Exception as error:
            error.add_note(f"trial {done.total()} of seed {seed}: {damage}")
            raise
        form.mend(damage)
        done[kind] += 1
    return done


def sound(form: Form, count: int) -> None:
    """No false alarm, in as many loads and verifications of what is sound."""
    for _ in range(count):
        form.verify()
        assert same(form.load(), state(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5_000, help="of each form")
    parser.add_argument("--sound", type=int, default=500, help="of each form")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    root = memory_directory()
    for kind in (Directory, File):
        begun = time.monotonic()
        form = kind(root / kind.__name__)
        done = trials(form, given.count, given.seed)
        sound(form, given.sound)
        what = ", ".join(f"{name} {done[name]}" for name in KINDS)
        print(f"{kind.__name__}: {done.total()} damages, all found and named ({what}); {given.sound} sound loads,"
              f" no false alarm; {time.monotonic() - begun:.0f} s", flush=True)  # fmt: skip
    shutil.rmtree(root)


if __name__ == "__main__":
    sys.exit(main())
