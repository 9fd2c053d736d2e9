"""Removing checkpoints that no rule keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from milepost.cli.listing import listed
from milepost.cli.progress import shown
from milepost.cli.reading import size_of, verify
from milepost.engine.retention import AnyOf, Entry, KeepBest, KeepEvery, KeepNewest, Retention, Rule
from milepost.errors import CheckpointError, MisconfigurationException


def prune(
    directory: Path,
    *,
    newest: int = 0,
    best: int = 0,
    every: int = 0,
    monitor: str | None = None,
    mode: Literal["min", "max"] = "min",
    really: bool = False,
    quiet: bool = False,
) -> tuple[list[str], list[str]]:
    """Apply rules to the checkpoints in `directory`. Returns the paths kept and those removed, or to be removed.

    What is to be kept is verified first. Damaged ones count for no rule, and they and those without a step are not
    removed: they are for a person to look at.

    Raises:
        MisconfigurationException: no rule, a rule that would keep nothing, or a rank without a metric.
    """
    rules: list[Rule] = []
    if newest:
        rules.append(KeepNewest(newest))
    if best:
        if monitor is None:
            raise MisconfigurationException("--keep-best ranks by a metric: name it with --monitor.")
        rules.append(KeepBest(best))
    if every:
        rules.append(KeepEvery(every))
    if not rules:
        raise MisconfigurationException("No rule says what to keep: give --keep-newest, --keep-best or --keep-every.")
    rows = listed(directory)
    entries = [
        Entry(row["path"], row["metrics"].get(monitor or ""), row["step"], row["time"])
        for row in rows
        if row["step"] is not None and row["error"] is None
    ]
    policy, sound = Retention(AnyOf(tuple(rules)), mode), set[str]()
    while unsound := [e for e in policy.retain(entries) if e.path not in sound and not _is_sound(e.path, sound, quiet)]:
        entries = [e for e in entries if e not in unsound]  # it must not take the place of a good one
    kept = {entry.path for entry in policy.retain(entries)}
    removed = [entry.path for entry in entries if entry.path not in kept]
    if really:
        for path in removed:
            _remove(Path(path))
    return [row["path"] for row in rows if row["path"] not in removed], removed


def _is_sound(path: str, sound: set[str], quiet: bool) -> bool:
    """Whether every byte of it holds. Noted in `sound`."""
    try:
        with shown(f"verifying {path}", size_of(Path(path)), quiet=quiet):
            verify(Path(path))
    except CheckpointError:
        return False
    sound.add(path)
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        from milepost.engine.commit import remove_checkpoint
        from milepost.storage.store import LocalStore

        remove_checkpoint(LocalStore(), str(path.absolute()))
    else:
        from milepost.storage import local

        local.remove(path)
