"""Classes found by name, and objects made of them, without running any code of theirs.

Nothing is imported, and no constructor, ``__setattr__``, ``__getattr__`` or descriptor is called: the name and the
attributes may come from a file that anybody wrote.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from typing import Any

_MISSING = object()


class Unresolved(LookupError):
    """A class or member that the form names is not there in this program."""


def name_of(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def class_of(name: str) -> type:
    """A class by name, out of modules that the program itself has imported, without asking any of them to import."""
    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        if not isinstance(found, (types.ModuleType, type)):
            raise Unresolved(name)
        holder = type if isinstance(found, type) else object  # past any __getattr__ and __getattribute__
        found = holder.__getattribute__(found, "__dict__").get(part)
    if not isinstance(found, type) or any("__del__" in vars(c) for c in found.__mro__):
        raise Unresolved(name)  # __del__ would be code that runs
    return found


def is_written_in_python(cls: type, bases: tuple[type, ...]) -> bool:
    """Whether all classes that `cls` derives from are plain Python ones, or among `bases`: it can be made empty."""
    heap_type = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement
    return not inspect.isabstract(cls) and all(c in (object, *bases) or c.__flags__ & heap_type for c in cls.__mro__)


def _slots(cls: type) -> list[str]:
    found: list[str] = []
    for c in reversed(cls.__mro__):
        found.extend(name for name, v in vars(c).items() if isinstance(v, types.MemberDescriptorType))
    return found


def state_of(value: Any) -> dict[str, Any]:
    """All that an object holds, fields first, without what is only cached."""
    state = {name: found for name in _slots(type(value)) if (found := getattr(value, name, _MISSING)) is not _MISSING}
    state.update(getattr(value, "__dict__", {}))
    cached = functools.cached_property
    return {k: v for k, v in state.items() if not isinstance(inspect.getattr_static(type(value), k, None), cached)}


def fill(made: Any, state: dict[str, Any]) -> Any:
    """Give `made` its attributes, past every descriptor but the slots that Python itself makes."""
    slots = set(_slots(type(made)))
    for name, value in state.items():
        if name in slots:
            object.__setattr__(made, name, value)
        else:
            object.__getattribute__(made, "__dict__")[name] = value
    return made
