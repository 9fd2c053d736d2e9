"""Copies from the memory of a device to that of the host, beside what the device computes.

The part that needs CUDA is `Cuda` alone. What staging does with it is tried on the CPU with a device that is none
(tests/engine/test_device.py), CUDA itself in tests/gpu.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from milepost.engine.memory import Memory


@dataclass(frozen=True, slots=True)
class Transfer:
    """A contiguous tensor of a device, and the address in host memory that its bytes go to."""

    tensor: torch.Tensor
    address: int


class Fence(Protocol):
    """Copies that were begun."""

    def hold(self) -> None:
        """Let what is queued on the current stream from now on wait for them. The host does not wait."""

    def wait(self) -> None:
        """Wait until they are done."""


class Device(Protocol):
    """What copies beside what it computes."""

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is its own, and can be copied as it lies in memory."""

    def pin(self, memory: Memory) -> None:
        """Called once for memory that copies go to."""

    def begin(self, transfers: Sequence[Transfer]) -> Fence:
        """Begin copying, behind all that is queued by now."""


class Cuda:
    """Copies on a stream of its own for each GPU, into pinned memory."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def takes(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cuda and type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.is_contiguous()

    def pin(self, memory: Memory) -> None:
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(memory.address, memory.size, 0)) == 0:  # else copies are staged by the driver
            weakref.finalize(memory, runtime.cudaHostUnregister, memory.address).atexit = False  # CUDA may be gone then

    def begin(self, transfers: Sequence[Transfer]) -> Fence:
        events = []
        for device in {transfer.tensor.device for transfer in transfers}:
            stream = self._streams.get(device)
            if stream is None:
                stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for transfer in transfers:
                    if transfer.tensor.device == device:
                        _bytes_at(transfer).copy_(_as_bytes(transfer.tensor), non_blocking=True)
                        transfer.tensor.record_stream(stream)  # its memory is not given to others before
            events.append((device, stream.record_event()))
        return _Events(events)


class _Events:
    def __init__(self, events: list[tuple[torch.device, torch.cuda.Event]]) -> None:
        self._events = events

    def hold(self) -> None:
        for device, event in self._events:
            torch.cuda.current_stream(device).wait_event(event)

    def wait(self) -> None:
        for _, event in self._events:
            event.synchronize()


def _bytes_at(transfer: Transfer) -> torch.Tensor:
    memory = (ctypes.c_char * transfer.tensor.nbytes).from_address(transfer.address)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
