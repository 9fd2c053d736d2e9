"""What the machine can do with as many bytes: the limits beside which figures stand."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from checkpoint.measuring import CHUNK, THREADS, seconds


class Limits:
    """A memcpy, a direct write and several ways of reading, of `size` bytes."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder = size, folder
        self.buffers = [mmap.mmap(-1, CHUNK) for _ in range(4)]
        for buffer in self.buffers:
            buffer.write(os.urandom(CHUNK))
        self.source = torch.ones(size // 4)
        self.target = torch.ones(size // 4)

    def _parallel(self, count: int, one: Callable[[int, mmap.mmap], Any], offsets: range) -> None:
        lock, left = threading.Lock(), iter(offsets)

        def work(number: int) -> None:
            while True:
                with lock:
                    offset = next(left, None)
                if offset is None:
                    return
                one(offset, self.buffers[number])

        threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _copy(self) -> None:
        half = self.size // THREADS

        def one(offset: int, _: mmap.mmap) -> None:
            ctypes.memmove(
                self.target.data_ptr() + offset, self.source.data_ptr() + offset, min(half, self.size - offset)
            )

        self._parallel(THREADS, one, range(0, self.size - THREADS, half))

    def copy(self) -> float:
        """Seconds of a warm memcpy with as many threads."""
        return seconds(self._copy)

    def _write(self, threads: int) -> None:
        rounded = -(-self.size // CHUNK) * CHUNK
        descriptor = os.open(self.folder / "raw", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
        os.posix_fallocate(descriptor, 0, rounded)
        self._parallel(threads, lambda at, buffer: os.pwrite(descriptor, buffer, at), range(0, rounded, CHUNK))
        os.ftruncate(descriptor, self.size)
        os.fsync(descriptor)
        os.close(descriptor)

    def write(self, threads: int = THREADS) -> float:
        """Seconds of a direct write of a fresh file, with fallocate and fsync."""
        taken = seconds(lambda: self._write(threads))
        (self.folder / "raw").unlink()
        return taken

    def read(self, path: Path, threads: int, direct: bool = True) -> float:
        """Seconds to read the files at `path` into buffers: the fastest of several ways is the limit of a load."""
        files = list(path.rglob("*.safetensors")) if path.is_dir() else [path]

        def work() -> None:
            for file in files:
                descriptor = os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0))

                def one(at: int, buffer: mmap.mmap, descriptor: int = descriptor) -> None:
                    os.preadv(descriptor, [buffer], at)

                self._parallel(threads, one, range(0, file.stat().st_size, CHUNK))
                os.close(descriptor)

        return seconds(work)
