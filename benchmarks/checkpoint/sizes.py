"""Figures of many tensors, of what is written again, of memory, and of the command line."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from checkpoint.measuring import THREADS, Figures, gpt2, remove, seconds, size_on_disk, step, total_bytes
from checkpoint.peers import fsync
from milepost.engine.directory import DirectoryEngine
from milepost.engine.restore import restore
from milepost.plugins import AsyncCheckpointIO, SnapshotCheckpointIO, TorchCheckpointIO

MILLION = 1_000_000


def small(figures: Figures) -> None:
    """20,000 tensors of 32 B to 10 kB, over safetensors."""
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    sizes = (32 * (10_000 / 32) ** torch.rand(20_000, generator=generator)).long() // 4
    state = {f"block.{n}.weight": torch.randn(int(size)) for n, size in enumerate(sizes)}
    engine = DirectoryEngine(threads=THREADS)
    path, peer = figures.fresh("ours"), figures.fresh("peer")

    def theirs() -> None:
        save_file(state, peer)
        fsync(peer)

    saves, loads = [], []
    for _ in range(figures.pairs):
        step(state)
        remove(path)
        remove(peer)
        saves.append(seconds(lambda: engine.save(path, state, background=False)) / seconds(theirs))
        loads.append(seconds(lambda: engine.load(path)) / seconds(lambda: load_file(peer)))
    figures.row("20,000 tensors: save", saves, "safetensors + fsync", "≤ 1.0")
    figures.row("20,000 tensors: load", loads, "safetensors", "≤ 1.0")
    names = sum(len(name) for name in state)
    extra = (size_on_disk(path) - total_bytes(state) - 3 * names) / len(state)
    figures.number("bytes a tensor beyond payload and 3 names", extra, "bytes", "≤ 400")
    remove(path)
    remove(peer)
    engine.close()


def reuse(figures: Figures) -> None:
    """A frozen base of 500 MB and 5 MB that change: bytes written after the first save, over the changed bytes."""
    state = {f"base.{n}": torch.randn(1 << 20) for n in range(125)}
    state |= {f"adapter.{n}": torch.randn(10_000) for n in range(125)}
    engine = DirectoryEngine(threads=THREADS)
    changed = sum(t.nbytes for name, t in state.items() if name.startswith("adapter"))
    ratios: list[float] = []
    before: set[int] = set()
    for number in range(11):
        step({name: tensor for name, tensor in state.items() if name.startswith("adapter")})
        path = figures.fresh(f"reuse{number}")
        engine.save(path, state, background=False)
        files = {p.stat().st_ino: p.stat().st_size for p in path.iterdir()}
        if number:
            ratios.append(sum(size for inode, size in files.items() if inode not in before) / changed)
        before = set(files)
    figures.row("bytes written, frozen base", ratios, "changed bytes", "≤ 1.05")
    path = figures.fresh("same")
    engine.save(path, state, background=False)
    same = sum(p.stat().st_size for p in path.iterdir() if p.stat().st_ino not in before)
    figures.number("bytes written by an identical save", same, "bytes", "≤ 16384")
    figures.row("size of a full save", [size_on_disk(path) / total_bytes(state)], "payload", "≤ 1.01")
    for number in range(11):
        remove(figures.folder / f"reuse{number}")
    remove(path)
    engine.close()


def million(figures: Figures) -> None:
    """A million tensors of 16 bytes: size, and what opening, loading and listing them takes."""
    path = figures.folder / "million" / "step-00000001"
    _save_a_million(figures, path)
    opened, opened_bytes, loaded, loaded_bytes = map(float, _in_a_process("_million", str(path)))
    figures.number("open, with the tree and the index", opened, "s")
    figures.number("memory for that", opened_bytes / 2**20, "MiB")
    figures.number("load all, after that", loaded, "s")
    figures.number("memory for all", loaded_bytes / 2**20, "MiB")
    figures.number("milepost ls of the two", _processor_of("ls", str(path.parent)), "s of processor", "< 0.2 s")
    remove(path.parent)


def _save_a_million(figures: Figures, path: Path) -> None:
    made = torch.randn(MILLION, 4)
    names = [f"blocks.{n // 1000}.experts.{n % 1000}.weight" for n in range(MILLION)]
    state = {"model": dict(zip(names, made.unbind(), strict=True))}
    engine = DirectoryEngine(threads=THREADS)
    figures.number("save", seconds(lambda: engine.save(path, state, background=False)), "s")
    made.add_(1)
    again = path.with_name("step-00000002")
    figures.number("save again, the plan known", seconds(lambda: engine.save(again, state, background=False)), "s")
    engine.close()
    extra = (size_on_disk(path) - made.nbytes - 3 * sum(map(len, names))) / MILLION
    figures.number("bytes a tensor beyond payload and 3 names", extra, "bytes", "≤ 400")


def measure_million(path: Path) -> None:
    """In a process of its own: time and memory of opening a checkpoint of a million tensors and of loading it."""
    engine = DirectoryEngine(threads=THREADS)
    gc.collect()
    base = _resident("VmRSS")
    begin = time.perf_counter()
    with engine.open(path) as stored:
        assert stored.tree and len(stored.index(0).names) == MILLION
        print(time.perf_counter() - begin, _resident("VmHWM") - base)
    begin = time.perf_counter()
    engine.load(path)
    print(time.perf_counter() - begin, _resident("VmHWM") - base)


def ls(figures: Figures) -> None:
    """Processor time of `milepost ls` of 40 checkpoints of both forms."""
    folder = figures.folder / "ls"
    directory = SnapshotCheckpointIO(background=False)
    for number in range(20):
        state = {"global_step": number, "state_dict": {f"layer.{n}.weight": torch.randn(8) for n in range(100)}}
        directory.save_checkpoint(state, folder / f"step-{number:08d}")
        TorchCheckpointIO().save_checkpoint(state, folder / f"{number}.ckpt")
    directory.teardown()
    taken = [_processor_of("ls", str(folder)) for _ in range(figures.pairs)]
    figures.number("milepost ls of 40 checkpoints", taken, "s of processor", "< 0.2 s")
    remove(folder)


def _processor_of(*command: str) -> float:
    process = subprocess.Popen([sys.executable, "-m", "milepost", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"milepost {command} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def memory(figures: Figures) -> None:
    """Peak extra host memory, in processes of their own."""
    for what in ("sync", "background", "AsyncCheckpointIO", "restore"):
        extra, arena = map(int, _in_a_process("_memory", what, str(figures.folder)))
        figures.number(f"{what}: peak beyond the state and the arena", (extra - arena) / 2**20, "MiB", "≤ 256")


def measure_memory(what: str, folder: Path) -> None:
    """In a process of its own: the peak of a save or a restore, and the arena."""
    state = gpt2()
    engine = DirectoryEngine(threads=THREADS)
    path = folder / "memory"
    if what == "restore" and not path.exists():
        engine.save(path, state, background=False)
        engine.close()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again at what is resident now
    before = _resident("VmRSS")
    if what == "restore":
        with engine.open(path) as stored:
            restore(engine, stored, state)
        remove(path)
    elif what == "AsyncCheckpointIO":
        plugin = AsyncCheckpointIO(TorchCheckpointIO())
        for _ in range(2):
            plugin.save_checkpoint(state, path.with_suffix(".ckpt")).result()
        print(_resident("VmHWM") - before, plugin._arenas[0].size)
        return
    else:
        engine.save(path, state, background=what == "background").result()
    print(_resident("VmHWM") - before, engine._arena.size)


IN_A_PROCESS: dict[str, Callable[..., None]] = {
    "_memory": lambda what, folder: measure_memory(what, Path(folder)),
    "_million": lambda path: measure_million(Path(path)),
}


def _in_a_process(*arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, sys.argv[0], *arguments], capture_output=True, text=True, check=True)
    return done.stdout.split()


def _resident(line: str) -> int:
    status: Any = Path("/proc/self/status").read_text()
    return next(int(found.split()[1]) for found in status.splitlines() if found.startswith(line)) * 1024
