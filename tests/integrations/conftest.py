"""What the tests of the integrations share."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def unpickled() -> Iterator[list[str]]:
    """What any unpickler of this process looks up."""
    found: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "pickle.find_class":
            found.append(".".join(map(str, arguments)))

    sys.addaudithook(watch)
    yield found
    watching = False


@pytest.fixture(autouse=True)
def _no_debug_lines() -> None:
    """DCP logs four lines for each of its steps; a failure would be buried in them."""
    logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.CRITICAL)
