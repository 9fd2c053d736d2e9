"""A `Store` one of whose calls fails, as a disk that is full or broken makes it fail."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass

from milepost.storage.store import LocalStore, Store


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong.

    Attributes:
        at: the number of the call, from 0, that fails.
        number: the errno it fails with.
        short: a write fails after half of its bytes.
        lasting: all calls after it fail too, but for those that remove and abandon.
    """

    at: int
    number: int = errno.EIO
    short: bool = False
    lasting: bool = False


class FaultyStore:
    """Passes calls on to `store`, until the one that fails.

    `calls` lists what was asked for, as (method, path), the one that failed included; `failed` is that one.
    """

    def __init__(self, fault: Fault | None = None, store: Store | None = None) -> None:
        self.fault = fault
        self.calls: list[tuple[str, str]] = []
        self.failed: tuple[str, str] | None = None
        self._store = store or LocalStore()
        self._lock = threading.Lock()
        self._paths: dict[int, str] = {}

    def make_directory(self, path: str) -> None:
        self._called("make_directory", path)
        self._store.make_directory(path)

    def create(self, path: str, size: int) -> int:
        self._called("create", path)
        descriptor = self._store.create(path, size)
        with self._lock:
            self._paths[descriptor] = path
        return descriptor

    def write(self, descriptor: int, data: memoryview, offset: int) -> None:
        try:
            self._called("write", self._paths[descriptor])
        except OSError:
            if self.fault is not None and self.fault.short:
                self._store.write(descriptor, data[: len(data) // 2], offset)
            raise
        self._store.write(descriptor, data, offset)

    def finish(self, descriptor: int, size: int) -> None:
        with self._lock:
            path = self._paths.pop(descriptor)
        try:
            self._called("finish", path)
        except OSError:
            self._store.abandon(descriptor)  # as `Store` has it: closed, also where that fails
            raise
        self._store.finish(descriptor, size)

    def abandon(self, descriptor: int) -> None:
        with self._lock:
            self.calls.append(("abandon", self._paths.pop(descriptor)))
        self._store.abandon(descriptor)

    def link(self, source: str, target: str) -> None:
        self._called("link", target)
        self._store.link(source, target)

    def rename(self, source: str, target: str) -> None:
        self._called("rename", target)
        self._store.rename(source, target)

    def exchange(self, one: str, other: str) -> None:
        self._called("exchange", other)
        self._store.exchange(one, other)

    def remove_file(self, path: str) -> None:
        self._called("remove_file", path)
        self._store.remove_file(path)

    def remove_directory(self, path: str) -> None:
        self._called("remove_directory", path)
        self._store.remove_directory(path)

    def sync_directory(self, path: str) -> None:
        self._called("sync_directory", path)
        self._store.sync_directory(path)

    def _called(self, method: str, path: str) -> None:
        with self._lock:
            number = sum(name != "abandon" for name, _ in self.calls)
            self.calls.append((method, path))
            fault = self.fault
            if fault is None or number < fault.at:
                return
            later = fault.lasting and not method.startswith("remove")
            if number == fault.at or (later and self.failed is not None):
                self.failed = self.failed or (method, path)
                raise OSError(fault.number, os.strerror(fault.number), path)
