"""Writing blobs: chunks are copied, digested and written by a few threads, each busy with another of the three."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import xxhash

from milepost.engine.memory import Memory
from milepost.engine.requests import CHUNK_BYTES, Image, Tailed
from milepost.format.layout import PIECE_BYTES
from milepost.storage.store import ALIGN_BYTES, Store


class Workers:
    """The threads of an engine, each with a buffer of one chunk, made when first needed and kept."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="milepost-write")
        self._local = threading.local()

    def buffer(self) -> memoryview:
        """This thread's buffer."""
        if not hasattr(self._local, "memory"):
            self._local.memory = Memory(CHUNK_BYTES)
        memory: Memory = self._local.memory
        return memory.bytes

    @property
    def pool(self) -> ThreadPoolExecutor:
        return self._pool

    def close(self) -> None:
        self._pool.shutdown(wait=True)


class _Target:
    """One file being written."""

    def __init__(self, path: str, image: Image, descriptor: int) -> None:
        self.path = path
        self.image = image
        self.descriptor = descriptor
        self.chunks = -(-image.size // CHUNK_BYTES)
        self.left = self.chunks
        self.digests: list[str] = [""] * self.chunks
        self.open = True


class BlobWriting:
    """Writes images to new files. When `run` returns, all of them are durable; where it raises, none is to be used."""

    def __init__(self, store: Store, workers: Workers) -> None:
        self._store = store
        self._workers = workers
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._busy = 0  # threads; counted here, since an interrupt of `submit` leaves no future of one that has begun
        self._idle = threading.Condition(self._lock)

    def run(self, blobs: Sequence[tuple[str, Image]]) -> list[str]:
        """Write each image to its path. Returns each one's digests, as an index holds them."""
        targets: list[_Target] = []
        try:
            for path, image in blobs:
                targets.append(_Target(path, image, self._store.create(path, image.size)))
            chunks = iter([(target, number) for target in targets for number in range(target.chunks)])
            futures = [self._workers.pool.submit(self._work, chunks) for _ in range(self._workers.count)]
            errors = [error for future in futures if (error := future.exception()) is not None]
            if errors:
                raise errors[0]
        finally:
            self._failed.set()  # where this was interrupted: no thread may write to a descriptor that is closed
            with self._idle:
                self._idle.wait_for(lambda: self._busy == 0)
            for target in targets:
                if target.open:
                    self._store.abandon(target.descriptor)
        return ["".join(target.digests) for target in targets]

    def _work(self, chunks: Iterator[tuple[_Target, int]]) -> None:
        with self._lock:
            if self._failed.is_set():
                return
            self._busy += 1
        try:
            buffer = self._workers.buffer()
            while not self._failed.is_set():
                with self._lock:
                    taken = next(chunks, None)
                if taken is None:
                    return
                self._write(*taken, buffer)
        except BaseException:
            self._failed.set()
            raise
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def _write(self, target: _Target, number: int, buffer: memoryview) -> None:
        size = target.image.size
        start = number * CHUNK_BYTES
        stop = min(start + CHUNK_BYTES, -(-size // ALIGN_BYTES) * ALIGN_BYTES)
        data = target.image.view(start, stop, buffer)
        target.digests[number] = piece_digests(data[: min(stop, size) - start])
        self._store.write(target.descriptor, data if size >= ALIGN_BYTES else data[:size], start)
        with self._lock:
            target.left -= 1
            last = target.left == 0
        if last:
            extra = target.image.tail("".join(target.digests)) if isinstance(target.image, Tailed) else b""
            if extra:
                self._store.write(target.descriptor, memoryview(extra), size)
            target.open = False
            self._store.finish(target.descriptor, size + len(extra))


def piece_digests(data: memoryview) -> str:
    """The digests of data that starts at the beginning of a piece, one after the other."""
    return "".join(
        [xxhash.xxh3_128_hexdigest(data[start : start + PIECE_BYTES]) for start in range(0, len(data), PIECE_BYTES)]
    )


def digests_of(image: Image, workers: Workers, got_on: Callable[[], None] = lambda: None) -> str:
    """The digests of a whole image, nothing written; `got_on` is called after each chunk, by any thread."""

    def one(start: int) -> str:
        stop = min(start + CHUNK_BYTES, image.size)
        found = piece_digests(image.view(start, stop, workers.buffer()))
        got_on()
        return found

    return "".join(workers.pool.map(one, range(0, image.size, CHUNK_BYTES)))
