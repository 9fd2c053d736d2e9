"""Several ranks for a test: a function run once in each of so many processes, by torch's own launcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

T = TypeVar("T")


def run_ranks(function: Callable[..., T], ranks: int, *arguments: Any) -> list[T]:
    """Call ``function(*arguments)`` in `ranks` processes of this machine, as torchrun would start them.

    Returns what each returned, by rank. `function` stands at the top of a module: it is sent by its name.

    Raises:
        ChildFailedError: one of them has failed; the others are ended. Its text holds that one's traceback.
    """
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, monitor_interval=0.1,
    )  # fmt: skip
    results: dict[int, T] = elastic_launch(config, function)(*arguments)
    return [results[rank] for rank in range(ranks)]
