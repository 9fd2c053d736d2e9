"""The narrow waist of the engine: the small types that planner, staging, writer and reader hand to each other.

Read this first. A state becomes `Leaf`s and tensors; leaves become `BlobPlan`s, which stay the same from save to save
and take up the tensors of each; an `Image` is a blob's bytes in memory, real or yet to be copied; a `Destination` is
memory that a stored tensor, or a part of it, is read into. Offsets are from the start of a blob's file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from milepost.format.layout import BlobLayout
from milepost.format.regions import Steps

if TYPE_CHECKING:  # readers of checkpoints, such as the command line, do without torch
    import torch

CHUNK_BYTES = 16 << 20
"""What one thread copies, digests and writes at a time: whole pieces, aligned for direct I/O."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """What is to be stored of one tensor of a state: nothing of the tensor itself, so that a plan outlives it.

    Attributes:
        number: of the leaf in its state.
        group: the state's top-level key that it stands under; "" for a tensor that is itself at the top.
        name: its key path below the group, joined by dots; unique in the group.
        dtype: its type as the format names it.
        shape: as stored.
        stride: where the memory is dense but not in C order, else None.
        stored_as: (torch's type, shape) where the format has no such type and the bytes are stored as U8, else None.
        part_of: (name, shape, offsets) where it is a part of a larger tensor: that one's name and shape, and where the
            part begins in it. Else None.
    """

    number: int
    group: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    stored_as: tuple[str, tuple[int, ...]] | None = None
    part_of: tuple[str, tuple[int, ...], tuple[int, ...]] | None = None


def unique(name: str, taken: set[str]) -> str:
    """`name`, or one like it that is not among those `taken`, and is from now on."""
    free, number = name, 2
    while free in taken:  # the keys "a.b" and "a", "b" give one name
        free, number = f"{name}#{number}", number + 1
    taken.add(free)
    return free


@dataclass(frozen=True, slots=True)
class BlobPlan:
    """A blob to write: its layout, and for each entry of it the leaf that it comes from, and the tensor of this save.

    Attributes:
        tensors: what the bytes are taken from, on any device. Empty in a plan that is kept for the next save.
    """

    name: str
    group: str
    layout: BlobLayout
    leaves: tuple[Leaf, ...]
    tensors: tuple[torch.Tensor, ...] = ()

    def bound(self, tensors: Sequence[torch.Tensor] | Mapping[int, torch.Tensor]) -> BlobPlan:
        """The plan for these tensors, given by the numbers of their leaves."""
        return replace(self, tensors=tuple([tensors[leaf.number] for leaf in self.leaves]))


class Image(Protocol):
    """The bytes of a blob, as they will be in its file."""

    size: int

    def view(self, start: int, stop: int, buffer: memoryview) -> memoryview:
        """The bytes of a range, in an aligned buffer: the image's own memory, or copied into `buffer` (a chunk long).

        Behind the end of the file, up to `stop`, stands anything.
        """


@runtime_checkable
class Tailed(Protocol):
    """An `Image` after whose bytes there stands something that depends on their digests."""

    def tail(self, digests: str) -> bytes:
        """What the file ends with. Called once, when everything before is on its way to the disk."""


class Destination(NamedTuple):
    """Host memory that takes a stored tensor or a part of it. (A named tuple: there may be a million of them.)

    Attributes:
        start, stop: where the first of its bytes lies in the file, and where the last one has been.
        address: where the first one belongs.
        run, steps: which of the bytes in between belong to it and how they lie in memory, as in `Region`.
    """

    start: int
    stop: int
    address: int
    run: int
    steps: Steps = ()
