"""Memory for tensors that the kernel may put back on the disk: more than the machine has at a time."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from pathlib import Path

import torch

_ALIGN_BYTES = 64


class Spill:
    """Tensors in a file without a name, which goes away with the last of them.

    Reserved in full at once: a full disk is an error here, and not a signal when a page is written.

    Args:
        folder: on a disk with room for `size`.
        size: bytes for all tensors; a few more are needed for each, so that it is aligned.

    Raises:
        OSError: there is no room.
    """

    def __init__(self, folder: Path, size: int, tensors: int) -> None:
        size = max(size + tensors * _ALIGN_BYTES, 1)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            self._memory = mmap.mmap(file.fileno(), size)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in C order; its values are to be filled in."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        start, self._used = self._used, self._used + -(-count * dtype.itemsize // _ALIGN_BYTES) * _ALIGN_BYTES
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=start).reshape(shape)


def free_memory_bytes() -> int:
    """What the machine could give a program now."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
