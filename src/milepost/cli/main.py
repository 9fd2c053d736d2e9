"""``milepost ls | show | verify | diff | convert | prune``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milepost.cli import tables
from milepost.errors import MilepostError

if TYPE_CHECKING:
    from milepost.cli.reading import Tensor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 where something is damaged or differs, 2 for what cannot be done."""
    chosen = _parser().parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except BrokenPipeError:
        return 0
    except (MilepostError, OSError) as error:
        print(f"milepost {chosen.command}: {tables.safe(str(error))}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    text = "Look at checkpoints, check them, compare, convert and prune them."
    parser = argparse.ArgumentParser(prog="milepost", description=text)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[Any], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="for programs")
        return made

    ls = command("ls", _ls, "List the checkpoints in directories: form, step, epoch, size, time, metrics.")
    ls.add_argument("directories", nargs="*", type=Path, default=[Path()])
    show = command("show", _show, "Show what a checkpoint holds: tensors with type and shape, and all other values.")
    show.add_argument("path", type=Path)
    verify = command(
        "verify", _verify, "Read every byte, compare it with its digest, and say what is damaged and where."
    )
    verify.add_argument("paths", nargs="+", type=Path)
    diff = command("diff", _diff, "Compare two checkpoints: what was added, removed, changed, and by how much.")
    diff.add_argument("one", type=Path)
    diff.add_argument("other", type=Path)
    convert = command("convert", _convert, "Convert between .ckpt, directory and .safetensors (weights only).")
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path)
    convert.add_argument(
        "--unpickle", action="store_true", help="load pickled objects of the source, which runs code that it names"
    )
    prune = command("prune", _prune, "Remove the checkpoints in a directory that no rule keeps.")
    prune.add_argument("directory", type=Path)
    prune.add_argument("--keep-newest", type=int, metavar="N", default=0)
    prune.add_argument("--keep-best", type=int, metavar="K", default=0)
    prune.add_argument("--keep-every", type=int, metavar="STEPS", default=0)
    prune.add_argument("--monitor", help="metric that --keep-best ranks by")
    prune.add_argument("--mode", choices=("min", "max"), default="min")
    prune.add_argument("--yes", action="store_true", help="remove; without it only what would be removed is listed")
    return parser


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _ls(chosen: Any) -> int:
    from milepost.cli.listing import listed

    rows = [row for directory in chosen.directories for row in listed(directory)]
    if chosen.json:
        _print_json(rows)
    elif not rows:
        print("no checkpoints")
    else:
        cells = [
            [
                row["path"], row["form"], tables.number(row["step"]), tables.number(row["epoch"]),
                tables.size(row["size_bytes"]), tables.moment(row["time"]),
                row["error"] or "  ".join(f"{k}={tables.number(v)}" for k, v in row["metrics"].items()),
            ]
            for row in rows
        ]  # fmt: skip
        print(tables.table(["checkpoint", "form", "step", "epoch", "size", "saved", "metrics"], cells, right=(2, 3, 4)))
    return 0


def _show(chosen: Any) -> int:
    from milepost.cli.reading import open_checkpoint

    found = open_checkpoint(chosen.path)
    tensors = found.tensors.items()
    if chosen.json:
        _print_json(
            {
                "path": found.path, "form": found.form, "step": found.step, "epoch": found.epoch, "time": found.time,
                "size_bytes": found.size_bytes, "metrics": found.metrics, "values": found.values,
                "tensors": {n: _tensor(t) for n, t in tensors},
            }
        )  # fmt: skip
        return 0
    metrics = "  ".join(f"{k}={tables.number(v)}" for k, v in found.metrics.items())
    total = sum(t.size_bytes for t in found.tensors.values())
    step = "" if found.step is None else f"step {found.step}, "
    print(tables.safe(f"{found.path}: {found.form}, {step}{tables.size(found.size_bytes)}  {metrics}".rstrip()))
    rows = [
        [n, t.dtype, str(list(t.shape)), tables.size(t.size_bytes), f"{len(t.parts)} parts" if t.parts else ""]
        for n, t in tensors
    ]
    header, width = [f"{len(rows)} tensors", "type", "shape", tables.size(total), ""], tables.columns(sys.stdout)
    print(tables.table(header, rows, right=(3,), width=width))
    print(tables.table(["", ""], [[name, text] for name, text in found.values.items()], width=width))
    return 0


def _tensor(tensor: Tensor) -> dict[str, Any]:
    found = {"dtype": tensor.dtype, "shape": tensor.shape, "size_bytes": tensor.size_bytes}
    if tensor.parts:
        found["parts"] = [{"file": file, "offsets": at, "shape": shape} for file, at, shape in tensor.parts]
    return found


def _verify(chosen: Any) -> int:
    from milepost.cli.progress import shown
    from milepost.cli.reading import find, size_of, verify
    from milepost.errors import CheckpointCorruptError, CheckpointError

    rows: list[dict[str, Any]] = []
    for path in [found for given in chosen.paths for found in find(given)]:
        row: dict[str, Any] = {"path": str(path), "state": "sound", "why": None, "tensor": None, "byte_range": None}
        try:
            with shown(f"verifying {path}", size_of(path), quiet=chosen.json):
                why = verify(path)
            if why is not None:
                row |= {"state": "not verifiable", "why": why}
        except CheckpointError as error:
            row |= {"state": "damaged", "why": str(error)}
            if isinstance(error, CheckpointCorruptError):
                row |= {"tensor": error.tensor, "byte_range": error.byte_range}
        rows.append(row)
        if not chosen.json:
            print(tables.safe(f"{path}: {row['state']}" + (f": {row['why']}" if row["why"] else "")), flush=True)
    if chosen.json:
        _print_json(rows)
    return int(any(row["state"] == "damaged" for row in rows))


def _diff(chosen: Any) -> int:
    from milepost.cli.comparing import compare
    from milepost.cli.progress import shown
    from milepost.cli.reading import open_checkpoint

    one, other = open_checkpoint(chosen.one), open_checkpoint(chosen.other)
    both = sum(t.size_bytes for opened in (one, other) for t in opened.tensors.values())
    with shown("comparing", both, quiet=chosen.json):
        changes = compare(one, other)
    if chosen.json:
        _print_json(changes)
    elif not changes:
        print("equal")
    else:
        rows = [
            [
                c["name"], c["kind"], tables.number(c.get("largest")), tables.number(c.get("relative")),
                str(c.get("differing") or ""), f"{c['from']} → {c['to']}" if "to" in c else "",
            ]
            for c in changes
        ]  # fmt: skip
        header = ["name", "what", "largest", "relative", "elements", ""]
        print(tables.table(header, rows, right=(2, 3, 4), width=tables.columns(sys.stdout)))
    return int(bool(changes))


def _convert(chosen: Any) -> int:
    from milepost.cli.converting import convert

    convert(chosen.source, chosen.target, unpickle=chosen.unpickle, quiet=chosen.json)
    if chosen.json:
        _print_json({"path": str(chosen.target)})
    else:
        print(tables.safe(f"{chosen.source} → {chosen.target}"))
    return 0


def _prune(chosen: Any) -> int:
    from milepost.cli.pruning import prune

    kept, removed = prune(
        chosen.directory, newest=chosen.keep_newest, best=chosen.keep_best, every=chosen.keep_every,
        monitor=chosen.monitor, mode=chosen.mode, really=chosen.yes, quiet=chosen.json,
    )  # fmt: skip
    if chosen.json:
        _print_json({"kept": kept, "removed": removed, "done": chosen.yes})
        return 0
    for path in removed:
        print(tables.safe(f"{'removed' if chosen.yes else 'would remove'} {path}"))
    print(f"{len(kept)} kept, {len(removed)} {'removed' if chosen.yes else 'to remove; nothing was done: add --yes'}")
    return 0
