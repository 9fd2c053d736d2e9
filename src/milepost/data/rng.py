"""Random state: captured, restored, isolated, and derived from a seed without drawing from any generator."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_WORDS = 624  # of a Mersenne Twister


@dataclass(frozen=True)
class RngState:
    """State of Python's, NumPy's, torch's and each initialised CUDA device's generators, as tensors and plain values."""

    python: torch.Tensor  # int64, 625 words
    python_gauss: float | None
    numpy: torch.Tensor  # int64, 624 words
    numpy_rest: tuple[int, int, float]  # position, has_gauss, cached_gaussian
    torch_cpu: torch.Tensor  # uint8
    cuda: tuple[torch.Tensor, ...]

    @classmethod
    def capture(cls) -> RngState:
        """Read every generator. Draws nothing."""
        _, words, gauss = random.getstate()
        _, keys, position, has_gauss, cached = np.random.get_state()
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        return cls(
            torch.tensor(words, dtype=torch.int64),
            gauss,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            (int(position), int(has_gauss), float(cached)),
            torch.get_rng_state(),
            tuple(torch.cuda.get_rng_state(d) for d in devices),
        )

    def restore(self) -> None:
        """Set every generator to this state. CUDA states beyond the devices that are present are left out."""
        random.setstate((3, tuple(self.python.tolist()), self.python_gauss))
        position, has_gauss, cached = self.numpy_rest
        np.random.set_state(("MT19937", self.numpy.numpy().astype(np.uint32), position, has_gauss, cached))
        torch.set_rng_state(self.torch_cpu)
        for device, state in enumerate(self.cuda[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)

    def state_dict(self) -> dict[str, Any]:
        return {
            "python": self.python,
            "python_gauss": self.python_gauss,
            "numpy": self.numpy,
            "numpy_rest": list(self.numpy_rest),
            "torch": self.torch_cpu,
            "cuda": list(self.cuda),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RngState:
        position, has_gauss, cached = state["numpy_rest"]
        return cls(
            state["python"].cpu(),
            state["python_gauss"],
            state["numpy"].cpu(),
            (int(position), int(has_gauss), float(cached)),
            state["torch"].cpu(),
            tuple(t.cpu() for t in state["cuda"]),
        )


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Whatever is drawn inside, the caller's generators are as before afterwards."""
    state = RngState.capture()
    try:
        yield
    finally:
        state.restore()


def run_seed() -> int:
    """A 63-bit seed for this run's data, derived from torch's generator without drawing from it."""
    return derived_seed(torch.get_rng_state().numpy().tobytes().hex())


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on `parts` and on nothing else, the same in every process and on every platform."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch with `seed` (63 bits; NumPy takes its lower 32)."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed Python, NumPy and torch; returns the seed.

    Args:
        seed: from 0 to 2**32 - 1. None reads the environment variable ``PL_GLOBAL_SEED``, and is 0 without it.
        workers: kept for Lightning's callers; loader workers are always seeded by the Trainer.
        verbose: print the seed.

    Raises:
        ValueError: the seed is out of bounds or no integer.
    """
    if seed is None:
        text = os.environ.get("PL_GLOBAL_SEED", "0")
        if not text.isdigit():
            raise ValueError(f"PL_GLOBAL_SEED={text!r} is not a non-negative integer. Set it to one, or pass seed=...")
        seed = int(text)
    if not 0 <= seed <= 0xFFFFFFFF:
        raise ValueError(f"seed={seed} is out of bounds: use one from 0 to {0xFFFFFFFF}.")
    os.environ["PL_GLOBAL_SEED"] = str(seed)
    os.environ["PL_SEED_WORKERS"] = str(int(workers))
    if verbose:
        print(f"Seed set to {seed}")
    seed_all(seed)
    return seed
