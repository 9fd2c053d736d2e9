"""A save in a process whose kernel refuses one kind of system call, or kills it there: run by test_local.py.

The refusal is the kernel's own (a seccomp filter), so nothing of Milepost or Python is replaced. Each save runs in a
fork; what became of it comes back through shared memory, since writing may be what is refused.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import resource
import sys
from pathlib import Path

from milepost.errors import CheckpointSaveError
from milepost.storage import local

CALLS = {  # x86_64
    "write": [1],
    "openat": [257],
    "flock": [73],
    "fsync": [74, 75],
    "rename": [82, 264, 316],
    "mkdir": [83, 258],
    "unlink": [87, 263],
}
KILL = 0x80000000
OLD, NEW = b"old" * 1000, b"new" * 100_000


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("value", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("start", ctypes.POINTER(_Instruction)))


def refuse(numbers: list[int], verdict: int) -> None:
    """From here on the kernel answers system calls of these numbers with `verdict`."""
    lines = [_Instruction(0x20, 0, 0, 0)]  # load the number of the call
    lines += [_Instruction(0x15, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    lines += [_Instruction(0x06, 0, 0, 0x7FFF0000), _Instruction(0x06, 0, 0, verdict)]
    program = _Program(len(lines), (_Instruction * len(lines))(*lines))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter")


def save(path: Path) -> str:
    try:
        with local.replacing(path, step=7) as file:
            file.write(NEW)
    except CheckpointSaveError as error:
        cause = error.__cause__
        number = cause.errno if isinstance(cause, OSError) and cause.errno else 0
        return json.dumps([errno.errorcode.get(number), error.path, error.step, str(error)])
    return json.dumps("saved")


def in_fork(path: Path, numbers: list[int], verdict: int) -> tuple[str, int]:
    """What a save to `path` said, and the status of its process."""
    shared = mmap.mmap(-1, 1 << 16)
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        refuse(numbers, verdict)
        said = save(path).encode()
        shared[: len(said)] = said
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return bytes(shared).rstrip(b"\0").decode(), status


def main(folder: Path) -> None:
    outcomes = []
    for call, numbers in CALLS.items():
        for name in ("ENOSPC", "EIO", "EROFS", "EPERM", "killed"):
            place = folder / f"{call}-{name}"
            place.mkdir()
            path = place / "deep" / "a.ckpt" if call == "mkdir" else place / "a.ckpt"
            if call != "mkdir":
                path.write_bytes(OLD)
            verdict = KILL if name == "killed" else 0x00050000 | getattr(errno, name)
            said, status = in_fork(path, numbers, verdict)
            content = path.read_bytes() if path.exists() else b""
            left = [p.name for p in place.iterdir()]
            with local.replacing(path) as file:  # the next save sweeps
                file.write(b"next")
            outcomes.append(
                {
                    "call": call,
                    "errno": name,
                    "said": json.loads(said) if said else None,
                    "status": status,
                    "content": {OLD: "old", NEW: "new", b"": "none"}.get(content, "torn"),
                    "left": left,
                    "swept": [p.name for p in path.parent.iterdir()] == ["a.ckpt"],
                }
            )
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
