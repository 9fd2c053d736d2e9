"""Saving in the background: a snapshot on the caller's thread, the rest on one worker, in order."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from milepost.errors import CheckpointSaveError, MisconfigurationException
from milepost.plugins.io import checkpoint_io as io_calls
from milepost.plugins.io.checkpoint_io import CheckpointIO
from milepost.plugins.io.torch_io import TorchCheckpointIO


class AsyncSave:
    """Handle of a save in the background."""

    def __init__(self, path: str, step: int | None, future: Future[Any]) -> None:
        self.path = path
        self.step = step
        self._future = future
        self._reported = False

    def done(self) -> bool:
        return self._future.done()

    @property
    def failed(self) -> bool:
        """Whether the save has ended badly, also where somebody else was told of it."""
        return self.done() and self._future.exception() is not None

    def result(self, timeout: float | None = None) -> None:
        """Wait until the checkpoint is durable; raise what the save failed with, once."""
        error = self._future.exception(timeout)
        if error is None or self._reported:
            return
        self._reported = True
        if isinstance(error, CheckpointSaveError):
            raise error
        raise CheckpointSaveError(
            f"Saving the checkpoint of step {self.step} to {self.path!r} in the background failed: "
            f"{type(error).__name__}: {error}",
            path=self.path,
            step=self.step,
        ) from error


class AsyncCheckpointIO(CheckpointIO):
    """Wraps another CheckpointIO and removes the wait from its saves.

    `save_checkpoint` copies the state (tensors to host memory, arrays and containers too, tied tensors tied) and
    returns a handle; loads, removals and other questions about a path wait for what is under way.

    Args:
        checkpoint_io: what writes; a `TorchCheckpointIO` by default.
        max_pending: saves under way at most; one more waits for the oldest. Memory is bounded by this many snapshots.

    Raises:
        MisconfigurationException: `checkpoint_io` lacks a method of a CheckpointIO, or `max_pending` is below 1.
    """

    def __init__(self, checkpoint_io: Any = None, max_pending: int = 1) -> None:
        if max_pending < 1:
            raise MisconfigurationException(f"max_pending={max_pending} must be at least 1.")
        self.checkpoint_io = TorchCheckpointIO() if checkpoint_io is None else checkpoint_io
        self._max_pending = max_pending
        self._pending: list[AsyncSave] = []
        self._worker: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    @property
    def checkpoint_io(self) -> Any:
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, inner: Any) -> None:
        if not io_calls.is_checkpoint_io(inner):
            raise MisconfigurationException(
                f"AsyncCheckpointIO({inner!r}): it needs save_checkpoint, load_checkpoint and remove_checkpoint."
            )
        self._checkpoint_io = inner

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> AsyncSave:
        """Take a snapshot and write it in the background.

        Raises:
            CheckpointSaveError: an earlier save failed and has not been reported yet; this one is then not begun.
        """
        self._report_ended()
        while len(self._pending) >= self._max_pending:
            self._take_oldest().result()
        frozen = snapshot(checkpoint)
        step = checkpoint.get("global_step") if isinstance(checkpoint, dict) else None
        future = self._submit(lambda: io_calls.save(self.checkpoint_io, frozen, path, storage_options).result())
        handle = AsyncSave(str(path), step, future)
        with self._lock:
            self._pending.append(handle)
        return handle

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        loaded: dict[str, Any] = self._in_order(
            lambda: io_calls.load(self.checkpoint_io, path, map_location=map_location, weights_only=weights_only)
        )
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        self._in_order(lambda: io_calls.remove(self.checkpoint_io, path))

    def exists(self, path: Any) -> bool:
        return bool(self._in_order(lambda: io_calls.exists(self.checkpoint_io, path)))

    def list(self, directory: Any) -> Any:
        return self._in_order(lambda: io_calls.list_checkpoints(self.checkpoint_io, directory)) or []

    def verify(self, path: Any) -> str | None:
        found: str | None = self._in_order(lambda: io_calls.verify(self.checkpoint_io, path))
        return found

    def probe(self, directory: Any) -> int | None:
        return io_calls.probe(self.checkpoint_io, directory)

    def link(self, source: Any, target: Any) -> bool:
        return bool(self._in_order(lambda: io_calls.link(self.checkpoint_io, source, target)))

    def check(self, checkpoint: dict[str, Any]) -> None:
        io_calls.check(self.checkpoint_io, checkpoint)

    def wait(self) -> None:
        """Wait for every save under way. Raises the first failure that has not been reported; none is raised twice."""
        while self._pending:
            self._take_oldest().result()
        io_calls.wait(self.checkpoint_io)

    def teardown(self) -> None:
        """Finish, stop the worker and tear the inner plugin down, whatever fails. Another run may follow."""
        try:
            self.wait()
        finally:
            worker, self._worker = self._worker, None
            if worker is not None:
                worker.shutdown(wait=True)
            io_calls.teardown(self.checkpoint_io)

    def _submit(self, work: Callable[[], Any]) -> Future[Any]:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="milepost-save")
        return self._worker.submit(work)

    def _in_order(self, work: Callable[[], Any]) -> Any:
        """Run `work` after all that was asked for before it: on the one worker while it is busy, else right here."""
        if self._worker is None or all(save.done() for save in self._pending):
            return work()
        return self._submit(work).result()

    def _report_ended(self) -> None:
        while self._pending and self._pending[0].done():
            self._take_oldest().result()

    def _take_oldest(self) -> AsyncSave:
        with self._lock:
            return self._pending.pop(0)


def snapshot(state: Any) -> Any:
    """A copy of `state` that nothing done later can change: tensors on the CPU, one copy for each shared storage."""
    copies: dict[int, torch.UntypedStorage] = {}
    memo: dict[int, Any] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _copied(value, copies)
        if type(value) in (dict, list, tuple):
            if type(value) is dict:
                return {key: visit(item) for key, item in value.items()}
            return type(value)(visit(item) for item in value)
        if isinstance(value, OrderedDict) and all(isinstance(v, torch.Tensor) for v in value.values()):
            rebuilt = OrderedDict((key, visit(item)) for key, item in value.items())
            if hasattr(value, "_metadata"):  # a state dict's versions, which loading reads
                rebuilt._metadata = copy.deepcopy(value._metadata)  # type: ignore[attr-defined]
            return rebuilt
        return copy.deepcopy(value, memo)

    return visit(state)


def _copied(tensor: torch.Tensor, copies: dict[int, torch.UntypedStorage]) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.layout is not torch.strided or (
        type(tensor) is not torch.Tensor and not isinstance(tensor, torch.nn.Parameter)
    ):
        return tensor.clone().cpu()
    storage = tensor.untyped_storage()
    key = storage.data_ptr()
    if key == 0 or tensor.is_conj() or tensor.is_neg():  # lazy bits that a view of the storage would lose
        return tensor.clone().cpu()
    if key not in copies:
        copies[key] = storage.cpu() if storage.device.type != "cpu" else storage.clone()  # type: ignore[no-untyped-call]
    made = torch.empty(0, dtype=tensor.dtype)
    return made.set_(copies[key], tensor.storage_offset(), tensor.size(), tensor.stride())
