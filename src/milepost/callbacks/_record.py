"""A checkpointer's catalog as the values that go into a checkpoint, and back. Pure but for the `exists` it is given."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch

from milepost.callbacks._naming import relative
from milepost.engine.retention import Catalog, Entry, Retention, obsolete

# Whether something is at a path; None where the plugin cannot tell.
Exists = Callable[[str], bool | None]


class View(TypedDict):
    """The catalog under the names that Lightning users read."""

    best_model_path: str
    best_model_score: torch.Tensor | None
    best_k_models: dict[str, torch.Tensor]
    kth_best_model_path: str
    kth_value: torch.Tensor
    last_model_path: str


def view(catalog: Catalog, policy: Retention) -> View:
    """`catalog` under Lightning's names; an unusable score shows as the worst there is, as it does there."""
    worst_value = math.inf if policy.mode == "min" else -math.inf

    def tensor(entry: Entry) -> torch.Tensor:
        return torch.tensor(entry.score if entry.scored else worst_value)

    best, kth = catalog.best(policy), catalog.kth(policy)
    ranked = {e.path for e in policy.order(catalog.entries)[: policy.k if policy.k >= 0 else None]}
    return View(
        best_model_path=best.path if best else "",
        best_model_score=tensor(best) if best and best.score is not None else None,
        best_k_models={e.path: tensor(e) for e in catalog.entries if e.score is not None and e.path in ranked},
        kth_best_model_path=kth.path if kth and kth.score is not None else "",
        kth_value=tensor(kth) if kth else torch.tensor(worst_value),
        last_model_path=catalog.last,
    )


def encode(before: Catalog, catalog: Catalog, dirpath: str) -> dict[str, Any]:
    """`catalog` as plain values, and what becoming it from `before` deletes; paths relative to `dirpath` if inside."""

    def place(path: str) -> str:
        return (relative(path, dirpath) or path) if path else ""

    def plain(entry: Entry) -> dict[str, Any]:
        return {"path": place(entry.path), "score": entry.score, "step": entry.step, "time": entry.time}

    return {
        "entries": [plain(e) for e in catalog.entries],
        "last": place(catalog.last),
        "crash": place(catalog.crash),
        "elsewhere": plain(catalog.elsewhere) if catalog.elsewhere else None,
        "doomed": [place(path) for path in obsolete(before, catalog)],
    }


def doomed(state: Mapping[str, Any], dirpath: str) -> list[str]:
    """What the commit of the file that holds `state` was to delete from `dirpath`, and may not have come to."""
    listed = state.get("milepost", {}).get("doomed", [])
    return [place for path in listed if relative(place := str(Path(dirpath, path)), dirpath) is not None]


def restore(state: Mapping[str, Any], dirpath: str, source: str, exists: Exists, policy: Retention) -> Catalog:
    """The catalog that `state` describes, reduced to what is still there.

    Args:
        state: what `ModelCheckpoint.state_dict` returned, ours or Lightning's.
        dirpath: where the run saves now; files found there under their relative path are the run's own again.
        source: the checkpoint that is being resumed, or ""; files beside it, or where they were, may still be the best.
        exists: whether something is at a path.
        policy: how to tell which of the files found outside `dirpath` is the best.
    """
    was = str(state.get("dirpath") or "")
    own = state["milepost"] if "milepost" in state else _from_lightning(state, was)

    def here(path: str) -> str:
        place = str(Path(dirpath, path))
        inside = relative(place, dirpath) is not None or "://" in dirpath
        found = exists(place)
        trusted = found if found is not None else (dirpath == was or Path(place).exists())
        return place if path and inside and trusted else ""

    def outside(path: str) -> str:
        places = (str(Path(base, path)) for base in (os.path.dirname(source), was) if base)  # noqa: PTH120
        return next((p for p in places if exists(p) or (exists(p) is None and Path(p).exists())), "")

    listed = [_entry(item) for item in own["entries"]]
    entries = tuple(_dated(replace(e, path=here(e.path))) for e in listed if here(e.path))
    others = [replace(e, path=outside(e.path)) for e in listed if not here(e.path)]
    if own.get("elsewhere"):
        kept = _entry(own["elsewhere"])
        others.append(replace(kept, path=outside(kept.path)))
    return Catalog(
        entries=entries,
        last=here(own["last"]),
        crash=here(own["crash"]),
        elsewhere=_first(policy.order(e for e in others if e.path)),
    )


def as_yaml(scores: Mapping[str, float]) -> str:
    """A YAML mapping of path to score."""

    def number(value: float) -> str:
        if math.isnan(value):
            return ".nan"
        if math.isinf(value):
            return ".inf" if value > 0 else "-.inf"
        mantissa, e, exponent = repr(value).partition("e")
        # YAML 1.1 reads 1e-05 as text: it wants a point.
        return f"{mantissa if '.' in mantissa or not e else mantissa + '.0'}{e}{exponent}"

    return "".join(f"{json.dumps(path)}: {number(score)}\n" for path, score in scores.items()) or "{}\n"


def _from_lightning(state: Mapping[str, Any], was: str) -> dict[str, Any]:
    def place(path: str) -> str:
        return (relative(path, was) or path) if path else ""

    best = state.get("best_model_path") or ""
    models = dict(state.get("best_k_models") or {})
    if best and best not in models:
        models[best] = state.get("best_model_score")
    return {
        "entries": [{"path": place(p), "score": None if s is None else float(s), "step": 0} for p, s in models.items()],
        "last": place(state.get("last_model_path") or ""),
        "crash": "",
    }


def _entry(item: Mapping[str, Any]) -> Entry:
    return Entry(path=item["path"], score=item["score"], step=item["step"], time=item.get("time", 0.0))


def _dated(entry: Entry) -> Entry:
    """With the time of the file where the state has none, so that no rule takes the checkpoint to be of 1970."""
    if entry.time or not Path(entry.path).exists():
        return entry
    return replace(entry, time=Path(entry.path).stat().st_mtime)


def _first(entries: Iterable[Entry]) -> Entry | None:
    return next(iter(entries), None)
