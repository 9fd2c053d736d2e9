"""Speed of saving and loading, beside the limits of the machine and the peers, in the same run.

    python benchmarks/checkpoint_speed.py [durable|blocking|lazy|load|one|small|reuse|memory ...] [--pairs 15] [--out F]

Every figure is a ratio of two measurements made next to each other, so that what else the machine does hits both; the
median over all pairs stands with the spread. The state is that of GPT-2 small with AdamW's moments, 1.5 GB. Limits: a
warm memcpy of the bytes, a direct write and a direct read of as many bytes with the same threads, pieces, reserved
space and fsync.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from milepost.engine.directory import DirectoryEngine
from milepost.plugins import AsyncCheckpointIO, SnapshotCheckpointIO, TorchCheckpointIO

CHUNK = 16 << 20
THREADS = 2


def gpt2(layers: int = 12, width: int = 768) -> dict[str, Any]:
    """Parameters and AdamW state of GPT-2 small (or a smaller one), random."""
    model: dict[str, torch.Tensor] = {"wte": torch.randn(50257, width), "wpe": torch.randn(1024, width)}
    for n in range(layers):
        sizes = {
            "ln_1.weight": (width,), "ln_1.bias": (width,), "attn.c_attn.weight": (width, 3 * width),
            "attn.c_attn.bias": (3 * width,), "attn.c_proj.weight": (width, width), "attn.c_proj.bias": (width,),
            "ln_2.weight": (width,), "ln_2.bias": (width,), "mlp.c_fc.weight": (width, 4 * width),
            "mlp.c_fc.bias": (4 * width,), "mlp.c_proj.weight": (4 * width, width), "mlp.c_proj.bias": (width,),
        }  # fmt: skip
        model |= {f"h.{n}.{name}": torch.randn(*size) for name, size in sizes.items()}
    moments = {
        n: {"step": torch.tensor(1.0), "exp_avg": torch.randn_like(p), "exp_avg_sq": torch.rand_like(p)}
        for n, p in enumerate(model.values())
    }
    return {"model": model, "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3, "params": [*moments]}]}}


def tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        return [t for value in state.values() for t in tensors(value)]
    return [t for value in state for t in tensors(value)] if isinstance(state, list) else []


def total_bytes(state: Any) -> int:
    return sum(t.nbytes for t in tensors(state))


def step(state: Any) -> None:
    """Change every value, as an optimizer does."""
    for tensor in tensors(state):
        tensor.add_(1e-3)


def seconds(work: Callable[[], Any]) -> float:
    gc.collect()
    os.sync()  # what removing the last file has left to do is nobody's
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def drop_cache(path: Path) -> None:
    """Have the kernel forget what it has of a file, so that a read goes to the disk."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def size_on_disk(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


# ---- limits ----------------------------------------------------------------------------------------------------------


class Limits:
    """What the machine can do with as many bytes."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder = size, folder
        self.buffers = [mmap.mmap(-1, CHUNK) for _ in range(4)]
        for buffer in self.buffers:
            buffer.write(os.urandom(CHUNK))
        self.source = torch.ones(size // 4)
        self.target = torch.ones(size // 4)

    def _parallel(self, count: int, one: Callable[[int, mmap.mmap], Any], offsets: range) -> None:
        lock, left = threading.Lock(), iter(offsets)

        def work(number: int) -> None:
            while True:
                with lock:
                    offset = next(left, None)
                if offset is None:
                    return
                one(offset, self.buffers[number])

        threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def copy(self) -> float:
        """A warm memcpy with as many threads."""
        half = self.size // THREADS

        def one(offset: int, _: mmap.mmap) -> None:
            ctypes.memmove(
                self.target.data_ptr() + offset, self.source.data_ptr() + offset, min(half, self.size - offset)
            )

        return seconds(lambda: self._parallel(THREADS, one, range(0, self.size - THREADS, half)))

    def write(self) -> float:
        """A direct write of a fresh file, with fallocate and fsync."""
        path = self.folder / "raw"
        rounded = -(-self.size // CHUNK) * CHUNK

        def work() -> None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
            os.posix_fallocate(descriptor, 0, rounded)
            self._parallel(THREADS, lambda at, buffer: os.pwrite(descriptor, buffer, at), range(0, rounded, CHUNK))
            os.ftruncate(descriptor, self.size)
            os.fsync(descriptor)
            os.close(descriptor)

        taken = seconds(work)
        path.unlink()
        return taken

    def read(self, path: Path, threads: int, direct: bool = True) -> float:
        """Read the files at `path` into buffers: the fastest of several ways is the limit of a load."""
        files = list(path.rglob("*.safetensors")) if path.is_dir() else [path]

        def work() -> None:
            for file in files:
                descriptor = os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0))

                def one(at: int, buffer: mmap.mmap, descriptor: int = descriptor) -> None:
                    os.preadv(descriptor, [buffer], at)

                self._parallel(threads, one, range(0, file.stat().st_size, CHUNK))
                os.close(descriptor)

        return seconds(work)


# ---- peers -----------------------------------------------------------------------------------------------------------


def fsync(path: Path) -> None:
    for file in path.rglob("*") if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def flat(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{prefix}.{key}").items()}
    return {}


def save_torch(state: Any, path: Path) -> None:
    torch.save(state, path)
    fsync(path)


def save_safetensors(state: Any, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(flat(state), path)
    fsync(path)


def save_dcp(state: Any, path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(state, storage_writer=dcp.FileSystemWriter(path, sync_files=True), no_dist=True)


def save_lightning(state: Any, path: Path) -> None:
    from pytorch_lightning.plugins.io import TorchCheckpointIO as Theirs

    Theirs().save_checkpoint(state, path)
    fsync(path)


PEERS = {
    "torch.save + fsync": save_torch, "safetensors + fsync": save_safetensors, "DCP": save_dcp,
    "Lightning TorchCheckpointIO + fsync": save_lightning,
}  # fmt: skip


# ---- figures ---------------------------------------------------------------------------------------------------------


class Bench:
    """Collects ratios and prints them."""

    def __init__(self, folder: Path, pairs: int) -> None:
        self.folder, self.pairs = folder, pairs
        self.rows: list[dict[str, Any]] = []

    def fresh(self, name: str) -> Path:
        path = self.folder / name
        remove(path)
        return path

    def row(self, figure: str, what: str, ratios: list[float], against: str, goal: str = "") -> None:
        low, high = min(ratios), max(ratios)
        self.rows.append(
            {
                "figure": figure, "what": what, "median": statistics.median(ratios), "min": low, "max": high,
                "pairs": len(ratios), "against": against, "goal": goal,
            }
        )  # fmt: skip
        middle = statistics.median(ratios)
        print(
            f"{figure:10} {what:42} {middle:8.3f}  ({low:.3f} to {high:.3f}, {len(ratios)})  × {against}  {goal}",
            flush=True,
        )

    def number(self, figure: str, what: str, value: float, unit: str, goal: str = "") -> None:
        self.rows.append({"figure": figure, "what": what, "value": value, "unit": unit, "goal": goal})
        print(f"{figure:10} {what:42} {value:12.4f} {unit}  {goal}", flush=True)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def durable(bench: Bench) -> None:
    """Time until durable, over the direct write of as many bytes."""
    state = gpt2()
    limits = Limits(total_bytes(state), bench.folder)
    engine = DirectoryEngine(threads=THREADS)
    ours = {
        "directory, synchronous": lambda path: engine.save(path, state, background=False),
        "directory, in the background": lambda path: engine.save(path, state).result(),
        ".ckpt, TorchCheckpointIO": lambda path: TorchCheckpointIO().save_checkpoint(state, path),
    }
    engine.prepare(state)
    for name, save in ours.items():
        ratios = []
        for _ in range(bench.pairs):
            step(state)
            path = bench.fresh("ours")
            ratios.append(seconds(lambda save=save, path=path: save(path)) / limits.write())
        bench.row("durable", name, ratios, "direct write", "" if "background" in name else "≤ 1.10")
    for name, peer in PEERS.items():
        ratios = []
        for _ in range(max(bench.pairs // 5, 2)):
            path = bench.fresh("peer")
            ratios.append(seconds(lambda peer=peer, path=path: peer(state, path)) / limits.write())
        bench.row("durable", name, ratios, "direct write")
    remove(bench.folder / "peer")
    remove(bench.folder / "ours")
    engine.close()


def blocking(bench: Bench) -> None:
    """Time that a save in the background takes from the loop, over a warm memcpy of the bytes."""
    from pytorch_lightning.plugins.io import AsyncCheckpointIO as Theirs
    from pytorch_lightning.plugins.io import TorchCheckpointIO as Inner

    state = gpt2()
    limits = Limits(total_bytes(state), bench.folder)
    io = SnapshotCheckpointIO(threads=THREADS)
    io._engine.prepare(state)
    ratios = []
    for _ in range(bench.pairs):
        step(state)
        path, handles = bench.fresh("ours"), []
        limits.copy()  # a loop comes to its save with busy cores, not from waiting for a disk
        taken = seconds(lambda path=path, handles=handles: handles.append(io.save_checkpoint(state, path)))
        handles[0].result()
        limits.copy()
        ratios.append(taken / limits.copy())
    bench.row("blocking", "SnapshotCheckpointIO, eager", ratios, "warm memcpy", "≤ 1.30")
    io.teardown()
    remove(bench.folder / "ours")
    ratios = []
    for _ in range(max(bench.pairs // 5, 2)):
        theirs, path = Theirs(Inner()), bench.fresh("peer")
        ratios.append(seconds(lambda theirs=theirs, path=path: theirs.save_checkpoint(state, path)) / limits.copy())
        theirs.teardown()
    bench.row("blocking", "Lightning AsyncCheckpointIO", ratios, "warm memcpy")
    remove(bench.folder / "peer")


def lazy(bench: Bench) -> None:
    """What a lazy save every ten steps of about a second takes from the loop: benchmarks/lazy_staging.py."""
    import lazy_staging

    state = gpt2()
    loop = lazy_staging.Loop(state["model"], bench.fresh("lazy"))
    size = total_bytes(state)
    del state
    pairs = [(loop.ten_steps(True), loop.ten_steps(False), lazy_staging.work_of_a_save(size, bench.folder))
             for _ in range(bench.pairs)]  # fmt: skip
    bench.row("lazy", "loop with a save", [a.loop / b.loop for a, b, _ in pairs], "loop without", "≤ 1.02")
    cpu = [(a.cpu - b.cpu) / work for a, b, work in pairs]
    bench.row("lazy", "CPU of a save", cpu, "memcpy + digest + direct write", "≤ 1.5")
    saves, held = [a.save * 1000 for a, _, _ in pairs], [a.held * 1000 for a, _, _ in pairs]
    bench.number("lazy", "in save, median", statistics.median(saves), "ms", "≤ 5 ms, both together")
    core = statistics.median(a.save_cpu * 1000 for a, _, _ in pairs)
    bench.number("lazy", "in save, of the core, median", core, "ms", "what others on it take left out")
    bench.number("lazy", "held back in the step, median", statistics.median(held), "ms", "≤ 5 ms, both together")
    bench.number("lazy", "a step, median", statistics.median(b.loop for _, b, _ in pairs) / lazy_staging.STEPS, "s")
    loop.checkpointer.close()


def load(bench: Bench) -> None:
    """Load and verify into existing tensors: cold over the fastest raw read, warm over safetensors with copy_."""
    from safetensors.torch import load_file

    from milepost.engine.restore import restore

    state = gpt2()
    limits = Limits(total_bytes(state), bench.folder)
    engine = DirectoryEngine(threads=THREADS)
    path, peer = bench.fresh("ours"), bench.fresh("peer")
    engine.save(path, state, background=False)
    save_safetensors(state, peer)
    live = {"model": state["model"], "optimizer": state["optimizer"]}

    def ours() -> None:
        with engine.open(path) as stored:
            restore(engine, stored, live)

    def theirs() -> None:
        loaded = load_file(peer)
        for name, tensor in flat(state).items():
            tensor.copy_(loaded[name])

    ours()
    cold = []
    for _ in range(bench.pairs):
        raw = []
        for threads, direct in ((1, True), (2, True), (4, True), (2, False)):
            drop_cache(path)
            raw.append(limits.read(path, threads, direct))
        drop_cache(path)
        cold.append(seconds(ours) / min(raw))
    bench.row("load", "directory, cold", cold, "fastest raw read", "≤ 1.15")
    warm = []
    for file in (path / "model.safetensors", path / "optimizer.safetensors", peer):
        with file.open("rb") as opened:
            while opened.read(CHUNK):
                pass
    for _ in range(bench.pairs):
        warm.append(seconds(ours) / seconds(theirs))
    bench.row("load", "directory, warm", warm, "safetensors + copy_", "≤ 1.15")
    remove(path)
    remove(peer)
    engine.close()


def one(bench: Bench) -> None:
    """Open one tensor of 2.4 MB out of 1.5 GB, verified, cold."""
    from milepost.engine.state import references

    state = gpt2()
    engine = DirectoryEngine(threads=THREADS)
    path = bench.fresh("ours")
    engine.save(path, state, background=False)
    taken, read = [], 0
    for _ in range(bench.pairs):
        drop_cache(path)
        begin = time.perf_counter()
        with engine.open(path) as stored:
            name = "h.5.attn.c_proj.weight"
            ref = next(r for r in references(stored.tree) if stored.index(r.blob).names[r.row] == name)
            engine.read_tensors(stored, [ref])
            read = stored.bytes_read
        taken.append((time.perf_counter() - begin) * 1000)
    bench.number("one", "tensor of 2.4 MB, cold, median", statistics.median(taken), "ms", "≤ 20 ms")
    bench.number("one", "bytes read beyond the tensor", read - state["model"]["h.5.attn.c_proj.weight"].nbytes, "bytes")
    remove(path)
    engine.close()


def small(bench: Bench) -> None:
    """20,000 tensors of 32 B to 10 kB, over safetensors."""
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    sizes = (32 * (10_000 / 32) ** torch.rand(20_000, generator=generator)).long() // 4
    state = {f"block.{n}.weight": torch.randn(int(size)) for n, size in enumerate(sizes)}
    engine = DirectoryEngine(threads=THREADS)
    path, peer = bench.fresh("ours"), bench.fresh("peer")

    def theirs() -> None:
        save_file(state, peer)
        fsync(peer)

    saves, loads = [], []
    for _ in range(bench.pairs):
        step(state)
        remove(path)
        remove(peer)
        saves.append(seconds(lambda: engine.save(path, state, background=False)) / seconds(theirs))
        loads.append(seconds(lambda: engine.load(path)) / seconds(lambda: load_file(peer)))
    bench.row("small", "save", saves, "safetensors + fsync", "≤ 1.0")
    bench.row("small", "load", loads, "safetensors", "≤ 1.0")
    names = sum(len(name) for name in state)
    extra = (size_on_disk(path) - total_bytes(state) - 3 * names) / len(state)
    bench.number("small", "bytes a tensor beyond payload and 3 names", extra, "bytes", "≤ 400")
    remove(path)
    remove(peer)
    engine.close()


def reuse(bench: Bench) -> None:
    """A frozen base of 500 MB and 5 MB that change: bytes written after the first save, over the changed bytes."""
    state = {f"base.{n}": torch.randn(1 << 20) for n in range(125)}
    state |= {f"adapter.{n}": torch.randn(10_000) for n in range(125)}
    engine = DirectoryEngine(threads=THREADS)
    changed = sum(t.nbytes for name, t in state.items() if name.startswith("adapter"))
    ratios, before = [], set()
    for number in range(11):
        for name, tensor in state.items():
            if name.startswith("adapter"):
                tensor.add_(1)
        path = bench.fresh(f"reuse{number}")
        engine.save(path, state, background=False)
        files = {p.stat().st_ino: p.stat().st_size for p in path.iterdir()}
        if number:
            ratios.append(sum(size for inode, size in files.items() if inode not in before) / changed)
        before = set(files)
    bench.row("reuse", "bytes written, frozen base", ratios, "changed bytes", "≤ 1.05")
    path = bench.fresh("same")
    engine.save(path, state, background=False)
    same = sum(p.stat().st_size for p in path.iterdir() if p.stat().st_ino not in before)
    bench.number("reuse", "bytes written by an identical save", same, "bytes", "≤ 16384")
    bench.number("reuse", "size over payload, full", size_on_disk(path) / total_bytes(state), "×", "≤ 1.01")
    for number in range(11):
        remove(bench.folder / f"reuse{number}")
    remove(path)
    engine.close()


def memory(bench: Bench) -> None:
    """Peak extra host memory, in processes of their own."""
    import subprocess

    for what in ("sync", "background", "AsyncCheckpointIO", "restore"):
        done = subprocess.run(
            [sys.executable, __file__, "_memory", what, "--folder", str(bench.folder)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        extra, arena = map(int, done.stdout.split())
        bench.number("memory", f"{what}: peak beyond the state and the arena", (extra - arena) / 2**20, "MiB", "≤ 256")


def _memory(what: str, folder: Path) -> None:
    from milepost.engine.restore import restore

    def resident(line: str) -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(found.split()[1]) for found in status.splitlines() if found.startswith(line)) * 1024

    state = gpt2()
    engine = DirectoryEngine(threads=THREADS)
    path = folder / "memory"
    if what == "restore" and not path.exists():
        engine.save(path, state, background=False)
        engine.close()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again at what is resident now
    before = resident("VmRSS")
    if what == "restore":
        with engine.open(path) as stored:
            restore(engine, stored, state)
        remove(path)
    elif what == "AsyncCheckpointIO":
        io = AsyncCheckpointIO(TorchCheckpointIO())
        for _ in range(2):
            io.save_checkpoint(state, path.with_suffix(".ckpt")).result()
        print(resident("VmHWM") - before, io._arenas[0].size)
        return
    else:
        engine.save(path, state, background=what == "background").result()
    print(resident("VmHWM") - before, engine._arena.size)


FIGURES = {f.__name__: f for f in (durable, blocking, lazy, load, one, small, reuse, memory)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", default=[*FIGURES])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    if chosen.figures[0] == "_memory":
        _memory(chosen.figures[1], chosen.folder)
        return
    folder = Path(tempfile.mkdtemp(dir=chosen.folder or Path.cwd(), prefix="bench-"))
    bench = Bench(folder, chosen.pairs)
    try:
        for figure in chosen.figures:
            FIGURES[figure](bench)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if chosen.out:
        chosen.out.write_text(json.dumps({"load_average": os.getloadavg(), "rows": bench.rows}, indent=1))


if __name__ == "__main__":
    main()
