"""Random state of the process: seeding it, keeping it, and running something without moving it."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from milepost import _distributed
from milepost._distributed import OfAllRanks
from milepost.errors import MisconfigurationException

_log = logging.getLogger(__name__)
_MAX_SEED = 2**32 - 1  # NumPy's global generator takes no larger one


@dataclass(frozen=True)
class RngState:
    """Python's ``random``, NumPy's global generator, torch's on the CPU and, once in use, on CUDA and XLA devices."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    torch: Tensor
    cuda: dict[int, Tensor]
    xla: int | None = None

    @classmethod
    def capture(cls) -> RngState:
        """The state now. Consumes nothing."""
        cuda = {}
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            cuda = {index: torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())}
        xla = _xla_in_use()
        seed = None if xla is None else int(xla.get_rng_state())
        return cls(random.getstate(), _numpy_state(), torch.get_rng_state(), cuda, seed)

    def restore(self) -> None:
        """Make this the state of the process. Devices that this machine lacks are left out."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda and torch.cuda.is_available():
            for index, state in self.cuda.items():
                if index < torch.cuda.device_count():
                    torch.cuda.set_rng_state(state, index)
        if self.xla is not None and (xla := _xla_in_use()) is not None:
            xla.set_rng_state(self.xla)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, which ``torch.load(weights_only=True)`` reads."""
        version, words, gauss = self.python
        kind, keys, position, has_gauss, cached = self.numpy
        return {
            "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
            "numpy": {
                "kind": str(kind),
                "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
                "position": int(position),
                "has_gauss": int(has_gauss),
                "cached": float(cached),
            },
            "torch": self.torch,
            "cuda": {str(index): state for index, state in self.cuda.items()},
            **({} if self.xla is None else {"xla": self.xla}),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RngState:
        """The reverse of `state_dict`."""
        python, numpy = state["python"], state["numpy"]
        keys = numpy["keys"].cpu().numpy().astype(np.uint32)
        return cls(
            (python["version"], tuple(python["words"].tolist()), python["gauss"]),
            (numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]),
            state["torch"].cpu(),
            {int(index): device.cpu() for index, device in state["cuda"].items()},
            state.get("xla"),
        )


class RandomState:
    """The process's random state as something with a state, for `milepost.Checkpointer`: it is restored last of all.

    Each rank has its own. Where another number of ranks has saved, a rank takes that of the rank of its number; one
    that was not there before begins a sequence of its own, which follows from the first rank's.
    """

    restored_last = True
    per_rank = True

    def state_dict(self) -> dict[str, Any]:
        """As it is now."""
        return RngState.capture().state_dict()

    def load_state_dict(self, state: dict[str, Any] | OfAllRanks[dict[str, Any]]) -> None:
        """Make `state` that of the process."""
        if not isinstance(state, OfAllRanks):
            RngState.from_state_dict(state).restore()
        elif (rank := _distributed.rank()) < len(state.values):
            RngState.from_state_dict(state.values[rank]).restore()
        else:
            first = RngState.from_state_dict(state.values[0])
            words = hashlib.blake2b(first.torch.numpy().tobytes() + str(rank).encode(), digest_size=4).digest()
            seed = int.from_bytes(words, "little")
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed Python, NumPy and torch on all devices, and remember the seed in ``PL_GLOBAL_SEED`` for child processes.

    Without `seed` the value of ``PL_GLOBAL_SEED`` is used, else 0. `workers` is remembered in ``PL_SEED_WORKERS``;
    loader workers are always seeded per batch here. Returns the seed. Raises MisconfigurationException for one
    outside 0 .. 2**32 - 1.
    """
    if seed is None:
        seed = _seed_of_environment()
    seed = int(seed)
    if not 0 <= seed <= _MAX_SEED:
        raise MisconfigurationException(f"seed {seed} is outside 0 .. {_MAX_SEED}; choose one within.")
    if verbose:
        _log.info("Seed set to %d", seed)
    os.environ["PL_GLOBAL_SEED"] = str(seed)
    os.environ["PL_SEED_WORKERS"] = str(int(workers))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if (xla := _xla_in_use()) is not None:
        xla.set_rng_state(seed)
    return seed


def _seed_of_environment() -> int:
    given = os.environ.get("PL_GLOBAL_SEED")
    if given is None:
        warnings.warn("No seed given and PL_GLOBAL_SEED is not set; the seed is 0.", stacklevel=3)
        return 0
    try:
        return int(given)
    except ValueError:
        warnings.warn(f"PL_GLOBAL_SEED={given!r} is not an integer; the seed is 0.", stacklevel=3)
        return 0


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Whatever is drawn or seeded inside leaves the caller's random state, CUDA's included, as it was."""
    state = RngState.capture()
    try:
        yield
    finally:
        state.restore()


def run_seed() -> int:
    """A 63-bit seed that depends on torch's random state alone and consumes none of it."""
    return _digest(torch.get_rng_state().numpy().tobytes())


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed, the same in every process and on every machine for the same `parts`."""
    return _digest(repr(parts).encode())


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch on the CPU from one 63-bit `seed`. CUDA is left alone."""
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    torch.default_generator.manual_seed(seed)


class PrivateRng:
    """Random state of its own for what runs inside ``with``; the process's CPU state is put back at the end.

    The first entry is seeded; each later one goes on where the last ended.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._own: tuple[Any, ...] | None = None
        self._outer: tuple[Any, ...] | None = None

    def __enter__(self) -> None:
        self._outer = _cpu_state()
        if self._own is not None:
            _set_cpu_state(self._own)
        else:
            seed_all(self._seed)

    def __exit__(self, *exc: object) -> None:
        self._own = _cpu_state()
        assert self._outer is not None
        _set_cpu_state(self._outer)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with the CPU generators seeded by `seed`, then put them back."""
    outer = _cpu_state()
    seed_all(seed)
    try:
        yield
    finally:
        _set_cpu_state(outer)


def _numpy_state() -> tuple[Any, ...]:
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)
    return state


def _xla_in_use() -> Any:
    """torch_xla's module with the random state of its device, once that device has been used; else None."""
    torch_xla = sys.modules.get("torch_xla")
    if torch_xla is None or not torch_xla._XLAC._xla_runtime_is_initialized():
        return None
    return sys.modules.get("torch_xla.core.xla_model")


def _cpu_state() -> tuple[Any, ...]:
    return random.getstate(), _numpy_state(), torch.get_rng_state()


def _set_cpu_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
