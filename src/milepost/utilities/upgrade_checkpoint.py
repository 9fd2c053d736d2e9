"""Bring files of older Lightning versions to the present layout, in place, as Lightning's command of this name does.

    python -m milepost.utilities.upgrade_checkpoint PATH ... [--extension .ckpt] [--map-to-cpu] [--unpickle]

Resuming does not need it: old files are migrated whenever they are read. It is for files that other programs read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from milepost.errors import CheckpointError
from milepost.plugins.io.torch_io import TorchCheckpointIO
from milepost.trainer.migration import CONTRACT_VERSION, VERSION_KEY, migrate_checkpoint


def upgrade(path: Path, *, unpickle: bool = False) -> str:
    """Migrate the file at `path`; return what was done, in words. Until the new file is durable the old one is there.

    Raises:
        CheckpointError: it is damaged, is none, or holds pickled objects and `unpickle` was not asked for.
    """
    checkpoint = TorchCheckpointIO().load_checkpoint(path, weights_only=False if unpickle else None)
    found = checkpoint.get(VERSION_KEY)
    if migrate_checkpoint(checkpoint).get(VERSION_KEY) == found:
        return f"left as it is: its version is {found}"
    TorchCheckpointIO(allow_pickle=unpickle).save_checkpoint(checkpoint, path)
    return f"upgraded from {found} to {CONTRACT_VERSION}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Upgrade every file that is named or lies in a directory that is named. Returns 1 if one could not be."""
    parser = argparse.ArgumentParser(
        prog="python -m milepost.utilities.upgrade_checkpoint", description="Upgrade checkpoints of older Lightnings."
    )
    parser.add_argument("path", nargs="+", type=Path, help="a file, or a directory to search")
    parser.add_argument("--extension", "-e", default=".ckpt", help="of the files in a directory")
    parser.add_argument("--map-to-cpu", "-m", action="store_true", help="of no effect: tensors come back on the CPU")
    parser.add_argument("--unpickle", action="store_true", help="load pickled objects too, which runs code of the file")
    given = parser.parse_args(arguments)
    failed = 0
    for path in _files(given.path, given.extension):
        try:
            print(f"{path}: {upgrade(path, unpickle=given.unpickle)}")
        except (CheckpointError, OSError) as error:
            failed += 1
            print(f"{path}: {error}", file=sys.stderr)
    return int(failed > 0)


def _files(paths: Iterable[Path], extension: str) -> list[Path]:
    return [
        file for path in paths for file in (sorted(path.rglob(f"*{extension}")) if path.is_dir() else [path])
    ]  # a name that is not there is an error of its own, told by the reading


if __name__ == "__main__":
    sys.exit(main())
