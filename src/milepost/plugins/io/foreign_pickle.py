"""Unpickling by opt-in what Lightning pickled, where Lightning is not installed or has moved the class.

Given to ``torch.load`` as its pickle module, of which it uses `Unpickler` and `load`. Only with ``weights_only=False``.
"""

from __future__ import annotations

import importlib
import pickle
import warnings
from typing import IO, Any

_PACKAGES = ("pytorch_lightning", "lightning.pytorch")  # one program in two packages: a file names either
_PARTS = ("lightning_fabric", "lightning.fabric")
_ROOTS = {"pytorch_lightning", "lightning", "lightning_fabric", "lightning_lite"}


class LeftOut:
    """Stands for an object whose class is not there: it takes any arguments and keeps what it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Unpickler(pickle.Unpickler):
    """Finds Lightning's classes under either of its names, and does without those that are not there."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            if module.split(".")[0] not in _ROOTS:
                raise
        for one, other in (_PACKAGES, _PARTS):
            for given, alias in ((one, other), (other, one)):
                if module == given or module.startswith(given + "."):
                    found = _attribute(alias + module.removeprefix(given), name)
                    if found is not None:
                        return found
        if name == "AttributeDict":
            return dict  # what it is but for the attributes
        warnings.warn(
            f"The file holds a {module}.{name}, which is not installed: an empty stand-in takes its place. Install the"
            " Lightning that wrote the file to read it.",
            UserWarning,
            stacklevel=2,
        )
        return type(name, (LeftOut,), {"__module__": module})


def load(file: IO[bytes], **options: Any) -> Any:
    """As `pickle.load`."""
    return Unpickler(file, **options).load()


def _attribute(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
