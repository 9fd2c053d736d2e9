"""Memory of the host that the kernel can read from, and write to, past the page cache."""

from __future__ import annotations

import ctypes
import mmap


class Memory:
    """Page-aligned memory of the host, for direct I/O."""

    def __init__(self, size: int) -> None:
        self.size = max(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE, mmap.PAGESIZE)
        self._map = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer page faults when it is first touched
        self.bytes = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
