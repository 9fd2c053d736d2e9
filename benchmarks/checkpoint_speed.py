"""Speed of saving and loading, beside the limits of the machine and the peers, in the same run.

    python benchmarks/checkpoint_speed.py [MODE ...] [--pairs 15] [--out figures]

Every ratio is of two measurements made next to each other, so that what else the machine does hits both; the median
over all pairs stands with the smallest and the largest. The state is that of GPT-2 small with AdamW's moments, 1.5 GB.
Limits: a warm memcpy of the bytes, a direct write and a direct read of as many bytes with the same threads, pieces,
reserved space and fsync. Each mode writes ``<mode>.json`` and ``<mode>.md``, a table, into the folder `--out`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from checkpoint import loading, saving, sizes
from checkpoint.measuring import Figures

MODES: dict[str, Callable[[Figures], None]] = {
    mode.__name__: mode
    for mode in (
        saving.durable, saving.blocking, saving.lazy, saving.plan, loading.load, loading.one, sizes.small, sizes.reuse,
        sizes.memory, sizes.ls, sizes.million,
    )
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", default=[*MODES], metavar="MODE", help=" | ".join(MODES))
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="a folder for JSON and tables")
    chosen = parser.parse_args()
    if unknown := [mode for mode in chosen.modes if mode not in MODES]:
        parser.error(f"no mode {', '.join(unknown)}; there are {', '.join(MODES)}")
    warnings.filterwarnings("ignore")
    folder = Path(tempfile.mkdtemp(dir=chosen.folder or Path.cwd(), prefix="bench-"))
    began = time.perf_counter()
    try:
        for mode in chosen.modes:
            start = time.perf_counter()
            figures = Figures(mode, folder, chosen.pairs)
            MODES[mode](figures)
            taken = time.perf_counter() - start
            figures.write(chosen.out, taken)
            print(f"{mode:9} took {taken:.0f} s", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"all took {time.perf_counter() - began:.0f} s; the tables are in {chosen.out}")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in sizes.IN_A_PROCESS:
        sizes.IN_A_PROCESS[sys.argv[1]](*sys.argv[2:])
    else:
        main()
