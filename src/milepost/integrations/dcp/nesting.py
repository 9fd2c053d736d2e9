"""Nested states from flat ones: DCP flattens what it saves, and keeps for each key the path that it came from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from milepost.errors import CheckpointFormatError

KeyPath = tuple[str | int, ...]


class _Node(dict[str | int, Any]):
    """A container under construction: a list where its keys are numbers."""


def nest(items: Iterable[tuple[KeyPath, Any]]) -> dict[str, Any]:
    """The nested dicts and lists whose values stand at these paths.

    Raises:
        CheckpointFormatError: two paths contradict each other, or the places of a list have gaps.
    """
    top = _Node()
    for path, value in items:
        node = top
        for key in path[:-1]:
            inner = node.setdefault(key, _Node())
            if not isinstance(inner, _Node):
                raise CheckpointFormatError(f"There is a value at a part of the key path {path}, and one at all of it.")
            node = inner
        if path[-1] in node:
            raise CheckpointFormatError(f"Two values have the key path {path}.")
        node[path[-1]] = value
    return {str(key): _plain(value) for key, value in top.items()}


def _plain(value: Any) -> Any:
    if not isinstance(value, _Node):
        return value
    if all(type(key) is int for key in value):
        if set(value) != set(range(len(value))):
            raise CheckpointFormatError(f"Of a list there are only the places {sorted(value)[:20]}.")
        return [_plain(value[place]) for place in range(len(value))]
    return {key: _plain(item) for key, item in value.items()}
