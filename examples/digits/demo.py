"""Kill a training run with SIGKILL, start it again with `ckpt_path="last"`, and compare it with an unbroken run.

`python demo.py [--out demo-out]` prints the comparison, draws `demo-out/losses.png`, exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
STEPS_AFTER_SAVE = 3
FIRST_EPOCH_TO_KILL = 2
TIME_LIMIT = 100.0  # seconds, for each of the waits

Line = dict[str, Any]


@dataclass(frozen=True)
class Kill:
    """Where the process was when killed. `saved_step`: of the newest checkpoint file; `lines`: log lines by then."""

    saved_step: int
    lines: int


def read_log(directory: Path) -> list[Line]:
    """The whole lines of a run's log; a last line without its newline is still being written and left out."""
    path = directory / "log.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


@cache
def step_inside(path: Path, inode: int, modified: int) -> int:
    """The optimizer step in a checkpoint file; `inode` and `modified` tell this file from a later one of its name."""
    return int(torch.load(path, map_location="cpu", weights_only=True)["global_step"])


def saved_step(directory: Path) -> int | None:
    """The optimizer step inside `last.ckpt`, or None while there is none."""
    path = directory / "checkpoints" / "last.ckpt"
    if not path.exists():
        return None
    status = path.stat()
    return step_inside(path, status.st_ino, status.st_mtime_ns)


def start(directory: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start train.py in a process of its own; all runs get one thread, since sums depend on the thread count."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "train.py"), str(directory), *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL if "--no-progress" in arguments else None
    )


def ready_to_kill(lines: list[Line], step: int | None) -> bool:
    """Whether the run is in epoch 2 or later and 3 steps past a save that lies inside this same epoch."""
    if step is None or not lines or lines[-1]["epoch"] < FIRST_EPOCH_TO_KILL:
        return False
    steps = [line["global_step"] for line in lines if line["epoch"] == lines[-1]["epoch"]]
    return steps[0] < step and steps[-1] >= step + STEPS_AFTER_SAVE


def kill_inside_epoch(directory: Path) -> Kill:
    """Train in `directory` until the run is where `ready_to_kill` wants it, then SIGKILL it.

    A slow machine may see the place too late, when the run has saved again: it is then trained anew, up to twice.

    Raises:
        RuntimeError: the run ended before it could be killed, took longer than the time limit, or three tries missed.
    """
    for _ in range(3):
        shutil.rmtree(directory, ignore_errors=True)
        process = start(directory)
        try:
            wait_for_place(process, directory)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        lines, step = read_log(directory), saved_step(directory)
        if step is not None and ready_to_kill(lines, step):
            return Kill(saved_step=step, lines=len(lines))
        print(f"\nKilled too late: step {step} had been saved by then. Once more:", flush=True)
    raise RuntimeError(
        f"three runs in {directory} saved again while being killed: the machine is too busy for this demo"
    )


def wait_for_place(process: subprocess.Popen[bytes], directory: Path) -> None:
    """Watch log and files until the run is where it is to be killed."""
    deadline = time.monotonic() + TIME_LIMIT
    while not ready_to_kill(read_log(directory), saved_step(directory)):
        if process.poll() is not None:
            raise RuntimeError(f"the run in {directory} ended with {process.returncode} before it could be killed")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the run in {directory} did not reach the kill within {TIME_LIMIT:.0f} s")
        time.sleep(0.002)


def finish(process: subprocess.Popen[bytes], name: str) -> None:
    """Wait for a run to end.

    Raises:
        RuntimeError: it failed.
    """
    if process.wait(timeout=TIME_LIMIT) != 0:
        raise RuntimeError(f"the {name} run failed with exit code {process.returncode}; its error is printed above")


def place(line: Line) -> str:
    return f"epoch {line['epoch']}, batch {line['batch_idx']}, optimizer step {line['global_step']}"


def shown(line: Line) -> str:
    return f"{float.fromhex(line['loss']):.9g}"


def report(killed: list[Line], resumed: list[Line], unbroken: list[Line], kill: Kill) -> bool:
    """Print where the run was killed and went on, losses and samples; return whether all batches are equal."""
    first = resumed[0]
    start_at = len(unbroken) - len(resumed)
    print(f"\nKilled (SIGKILL) after  {place(killed[-1])}; newest checkpoint: step {kill.saved_step}")
    print(f"Went on at              {place(first)}")
    print("\n epoch batch  unbroken loss  resumed loss   before the kill   (9 digits tell any two float32 apart)")
    for at in range(max(0, start_at - 3), min(start_at + 10, len(unbroken))):
        line = unbroken[at]
        after = shown(resumed[at - start_at]) if at >= start_at else "-"
        before = shown(killed[at]) if at < len(killed) else "-"
        print(f" {line['epoch']:5d} {line['batch_idx']:5d}  {shown(line):13s}  {after:13s}  {before}")
    print(f"\nFirst batch after the resume: index {first['batch_idx']}, samples {first['ids']}")
    expected = unbroken[start_at]
    print(f"The same in the unbroken run: index {expected['batch_idx']}, samples {expected['ids']}")
    equal = killed == unbroken[: len(killed)] and resumed == unbroken[start_at:]
    print(
        f"\n{len(resumed)} batches after the resume: {'all equal to' if equal else 'DIFFERENT from'} the unbroken run's"
    )
    return equal


def draw(killed: list[Line], resumed: list[Line], unbroken: list[Line], path: Path) -> None:
    """Draw both loss curves over the batches of the whole run, with the kill and the resume marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    start_at = len(unbroken) - len(resumed)
    figure, axes = pyplot.subplots(figsize=(11, 5), layout="constrained")

    def curve(lines: list[Line], first: int, **style: Any) -> None:
        axes.plot(range(first, first + len(lines)), [float.fromhex(line["loss"]) for line in lines], **style)

    curve(unbroken, 0, color="0.75", linewidth=5, label="unbroken")
    curve(killed, 0, color="tab:red", linewidth=1.2, label="until the kill")
    curve(resumed, start_at, color="tab:blue", linewidth=1.2, label="after the resume")
    axes.axvline(len(killed) - 1, color="tab:red", linestyle="--", label=f"killed: {place(killed[-1])}")
    axes.axvline(start_at, color="tab:blue", linestyle=":", label=f"went on: {place(resumed[0])}")
    axes.set(
        xlabel="batch of the run",
        ylabel="training loss",
        yscale="log",
        title="Digits: killed and resumed, and unbroken",
    )
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def run(out: Path) -> bool:
    """Run the three processes below `out` and print the comparison; return whether nothing differs."""
    for name in ("unbroken", "killed"):
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    unbroken_process = start(out / "unbroken", "--no-progress")
    try:
        print("Training, to be killed:", flush=True)
        kill = kill_inside_epoch(out / "killed")
        print('\nKilled. Starting again with ckpt_path="last":', flush=True)
        finish(start(out / "killed", "--ckpt-path", "last"), "resumed")
        finish(unbroken_process, "unbroken")
    finally:
        unbroken_process.kill()
        unbroken_process.wait()
    lines, unbroken = read_log(out / "killed"), read_log(out / "unbroken")
    killed, resumed = lines[: kill.lines], lines[kill.lines :]
    equal = report(killed, resumed, unbroken, kill)
    digests = {name: (out / name / "digest.txt").read_text().strip() for name in ("unbroken", "killed")}
    same = digests["unbroken"] == digests["killed"]
    print(f"\nFinal weights, unbroken: {digests['unbroken']}\nFinal weights, resumed:  {digests['killed']}")
    print("The final weights are equal, bit for bit." if same else "The final weights DIFFER.")
    print("\nFiles left by the killed and resumed run:")
    for path in sorted((out / "killed").rglob("*")):
        if path.is_file():
            print(f"  {path.stat().st_size:9,d} bytes  {path.relative_to(out)}")
    draw(killed, resumed, unbroken, out / "losses.png")
    print(f"\nPicture: {out / 'losses.png'}   ({time.monotonic() - began:.0f} s in all)")
    return equal and same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    return 0 if run(parser.parse_args().out) else 1


if __name__ == "__main__":
    sys.exit(main())
