"""Figures of saving the 1.5 GB: until it is durable, and what the loop loses."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint import lazy_staging, peers
from checkpoint.limits import Limits
from checkpoint.measuring import THREADS, Figures, gpt2, remove, seconds, step, total_bytes
from milepost.engine.collector import collector_paused
from milepost.engine.directory import DirectoryEngine
from milepost.engine.plan_memory import PlanMemory
from milepost.engine.state import Flattened
from milepost.engine.torch_file import THREADS as TORCH_FILE_THREADS
from milepost.plugins import AsyncCheckpointIO, SnapshotCheckpointIO, TorchCheckpointIO


def durable(figures: Figures) -> None:
    """Time until durable, over the direct write of as many bytes with the same threads."""
    state = gpt2()
    limits = Limits(total_bytes(state), figures.folder)
    engine = DirectoryEngine(threads=THREADS)

    def pairs(name: str, save: Callable[[Path], Any], threads: int, goal: str) -> None:
        ratios = []
        for _ in range(figures.pairs):
            step(state)
            path = figures.fresh("saved")
            ratios.append(seconds(lambda path=path: save(path)) / limits.write(threads))  # type: ignore[misc]
        figures.row(name, ratios, f"direct write, {threads} threads", goal)

    pairs("directory", lambda path: engine.save(path, state, background=False), THREADS, "≤ 1.10")
    pairs(".ckpt", lambda path: TorchCheckpointIO().save_checkpoint(state, path), TORCH_FILE_THREADS, "≤ 1.10")
    for name, peer in peers.SYNCHRONOUS.items():
        pairs(name, lambda path, peer=peer: peer(state, path), THREADS, "")  # type: ignore[misc]
    figures.fresh("saved")
    engine.close()


def blocking(figures: Figures) -> None:
    """Time that a save in the background takes from the loop, over a warm memcpy; and until it is durable."""
    state = gpt2()
    limits = Limits(total_bytes(state), figures.folder)
    plugin = SnapshotCheckpointIO(threads=THREADS)
    plugin._engine.prepare(state)
    to_file = AsyncCheckpointIO(TorchCheckpointIO())
    to_file.save_checkpoint(state, figures.fresh("first")).result()  # gets the memory for its copies
    figures.fresh("first")
    ways: dict[str, Callable[[Any, Path], peers.Begun]] = {
        "SnapshotCheckpointIO, eager": lambda state, path: plugin.save_checkpoint(state, path).result,
        "AsyncCheckpointIO": lambda state, path: to_file.save_checkpoint(state, path).result,
        **peers.IN_BACKGROUND,
    }
    for name, begin in ways.items():
        blocked, whole = [], []
        for _ in range(figures.pairs):
            step(state)
            path, waits = figures.fresh("saved"), []
            limits.copy()  # a loop comes to its save with busy cores, not from waiting for a disk
            began = seconds(lambda begin=begin, path=path, waits=waits: waits.append(begin(state, path)))  # type: ignore[misc]
            start = time.perf_counter()
            waits[0]()
            whole.append((began + time.perf_counter() - start) / limits.write())
            limits.copy()
            blocked.append(began / limits.copy())
        goal = "≤ 1.30" if name == "SnapshotCheckpointIO, eager" else ""
        figures.row(f"blocked: {name}", blocked, f"warm memcpy, {THREADS} threads", goal)
        figures.row(f"durable: {name}", whole, f"direct write, {THREADS} threads")
    plugin.teardown()
    to_file.teardown()
    figures.fresh("saved")


def plan(figures: Figures) -> None:
    """What a save does before it copies: finding, naming and laying out the tensors, and with the plan known."""
    state = gpt2(width=48)  # as many tensors as the large one, and as deep
    memory = PlanMemory()

    def milliseconds(plans: Callable[[Flattened], object]) -> float:
        with collector_paused():  # as in a save
            begin = time.thread_time()
            flattened = Flattened(state)
            plans(flattened)
            return (time.thread_time() - begin) * 1000

    milliseconds(memory.plans)
    new = [milliseconds(lambda flattened: PlanMemory().plans(flattened)) for _ in range(figures.pairs)]
    known = [milliseconds(memory.plans) for _ in range(figures.pairs)]
    count = len(Flattened(state).tensors)
    figures.number(f"a new structure of {count} tensors", new, "ms of processor")
    figures.number("the same, its plan known", known, "ms of processor")


def lazy(figures: Figures) -> None:
    """What a lazy save every ten steps of about a second takes from the loop: lazy_staging.py."""
    state = gpt2()
    loop = lazy_staging.Loop(state["model"], figures.fresh("lazy"))
    size = total_bytes(state)
    del state
    pairs = [(loop.ten_steps(True), loop.ten_steps(False)) for _ in range(max(figures.pairs // 2, 3))]
    figures.row("the loop with a save", [a.loop / b.loop for a, b in pairs], "the loop that never saves", "≤ 1.02")
    core = [a.loop_cpu / b.loop_cpu for a, b in pairs]  # what others on it take left out
    figures.row("the same, of the loop's core", core, "the loop that never saves", "≤ 1.02")
    figures.number("in save and held back in steps", [(a.save + a.held) * 1000 for a, _ in pairs], "ms", "≤ 5 ms")
    figures.number("in save", [a.save * 1000 for a, _ in pairs], "ms")
    figures.number("in save, of its core", [a.save_cpu * 1000 for a, _ in pairs], "ms")
    figures.number("held back in steps", [a.held * 1000 for a, _ in pairs], "ms")
    figures.number("a step", [b.loop / lazy_staging.STEPS for _, b in pairs], "s")
    processor = [
        loop.processor_of_a_save() / lazy_staging.work_of_a_save(size, figures.folder) for _ in range(figures.pairs)
    ]
    figures.row("processor seconds of a save", processor, "memcpy + digest + direct write", "≤ 1.5")
    loop.checkpointer.close()
    remove(figures.folder / "lazy")
