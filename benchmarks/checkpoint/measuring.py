"""The state that is saved, how time is taken, and how figures are kept."""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

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


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Figures:
    """Collects figures, prints each as it is known, and writes them as JSON and as a table."""

    def __init__(self, mode: str, folder: Path, pairs: int) -> None:
        self.mode, self.folder, self.pairs = mode, folder, pairs
        self.rows: list[dict[str, Any]] = []

    def fresh(self, name: str) -> Path:
        path = self.folder / name
        remove(path)
        return path

    def row(self, what: str, ratios: Sequence[float], against: str, goal: str = "") -> None:
        """A ratio, measured several times."""
        self._add(what, ratios, against, goal)

    def number(self, what: str, values: float | Sequence[float], unit: str, goal: str = "") -> None:
        """A figure with a unit, measured once or several times."""
        self._add(what, values if isinstance(values, Sequence) else [values], unit, goal)

    def _add(self, what: str, values: Sequence[float], against: str, goal: str) -> None:
        row = {
            "what": what, "median": statistics.median(values), "min": min(values), "max": max(values),
            "times": len(values), "against": against, "goal": goal,
        }  # fmt: skip
        self.rows.append(row)
        print(f"{self.mode:9} {what:58} {_spread(row):32} {against}  {goal}", flush=True)

    def write(self, out: Path, seconds_taken: float) -> None:
        """Write ``<mode>.json`` and ``<mode>.md`` into `out`."""
        out.mkdir(parents=True, exist_ok=True)
        data = {"mode": self.mode, "seconds": seconds_taken, "load_average": os.getloadavg(), "rows": self.rows}
        (out / f"{self.mode}.json").write_text(json.dumps(data, indent=1))
        lines = ["| what | measured | against or unit | goal |", "| --- | --- | --- | --- |"]
        lines += [f"| {r['what']} | {_spread(r)} | {r['against']} | {r['goal']} |" for r in self.rows]
        (out / f"{self.mode}.md").write_text("\n".join(lines) + "\n")


def _spread(row: dict[str, Any]) -> str:
    if row["times"] == 1:
        return f"{row['median']:.4g}"
    return f"{row['median']:.4g} ({row['min']:.4g} to {row['max']:.4g}; {row['times']})"
