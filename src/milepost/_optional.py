"""The only handler of a missing optional package."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from milepost.errors import MissingDependencyError


def available(package: str) -> bool:
    """Whether `package` can be imported, found without importing it."""
    return importlib.util.find_spec(package) is not None


def require(package: str, *, extra: str, needed_by: str) -> ModuleType:
    """Import and return `package`.

    Raises:
        MissingDependencyError: it is not installed; the message names `extra`, the pip extra that brings it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package.split(".")[0]:
            raise  # the package is there, something that it needs is not
        raise MissingDependencyError(
            f"{needed_by} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'milepost[{extra}]'"
        ) from error
