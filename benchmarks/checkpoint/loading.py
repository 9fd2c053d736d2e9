"""Figures of loading: all of it into live tensors, and one tensor."""

from __future__ import annotations

import time

from checkpoint.limits import Limits
from checkpoint.measuring import CHUNK, THREADS, Figures, drop_cache, gpt2, remove, seconds, total_bytes
from checkpoint.peers import flat, save_safetensors
from milepost.engine.directory import DirectoryEngine
from milepost.engine.restore import restore
from milepost.engine.state import references


def load(figures: Figures) -> None:
    """Load and verify into existing tensors: cold over the fastest raw read, warm over safetensors with copy_."""
    from safetensors.torch import load_file

    state = gpt2()
    limits = Limits(total_bytes(state), figures.folder)
    engine = DirectoryEngine(threads=THREADS)
    path, peer = figures.fresh("ours"), figures.fresh("peer")
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
    for _ in range(figures.pairs):
        raw = []
        for threads, direct in ((1, True), (2, True), (4, True), (2, False)):
            drop_cache(path)
            raw.append(limits.read(path, threads, direct))
        drop_cache(path)
        cold.append(seconds(ours) / min(raw))
    figures.row("cold", cold, "fastest of four raw reads", "≤ 1.15")
    for file in (path / "model.safetensors", path / "optimizer.safetensors", peer):
        with file.open("rb") as opened:
            while opened.read(CHUNK):
                pass
    warm = [seconds(ours) / seconds(theirs) for _ in range(figures.pairs)]
    figures.row("warm", warm, "safetensors + copy_", "≤ 1.15")
    remove(path)
    remove(peer)
    engine.close()


def one(figures: Figures) -> None:
    """Open one tensor of 2.4 MB out of 1.5 GB, verified, cold."""
    state = gpt2()
    engine = DirectoryEngine(threads=THREADS)
    path = figures.fresh("ours")
    engine.save(path, state, background=False)
    name, taken, read = "h.5.attn.c_proj.weight", [], 0
    for _ in range(figures.pairs):
        drop_cache(path)
        begin = time.perf_counter()
        with engine.open(path) as stored:
            ref = next(r for r in references(stored.tree) if stored.index(r.blob).names[r.row] == name)
            engine.read_tensors(stored, [ref])
            read = stored.bytes_read
        taken.append((time.perf_counter() - begin) * 1000)
    figures.number("tensor of 2.4 MB, cold", taken, "ms", "≤ 20 ms")
    figures.number("bytes read beyond the tensor", read - state["model"][name].nbytes, "bytes")
    remove(path)
    engine.close()
