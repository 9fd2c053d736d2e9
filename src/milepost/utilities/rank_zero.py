"""What one rank alone is to do, under the names that Lightning users know."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from milepost import _distributed

__all__ = ["rank_zero_debug", "rank_zero_deprecation", "rank_zero_info", "rank_zero_only", "rank_zero_warn"]

P = ParamSpec("P")
T = TypeVar("T")
_log = logging.getLogger("milepost")


class _RankZeroOnly:
    """A decorator that is asked for the rank too, as in ``if rank_zero_only.rank == 0``."""

    @property
    def rank(self) -> int:
        return _distributed.rank()

    def __call__(self, fn: Callable[P, T], default: T | None = None) -> Callable[P, T | None]:
        """`fn` on rank 0; on the others what is called returns `default`."""

        @functools.wraps(fn)
        def only(*args: P.args, **kwargs: P.kwargs) -> T | None:
            return fn(*args, **kwargs) if self.rank == 0 else default

        return only


rank_zero_only = _RankZeroOnly()


@rank_zero_only
def rank_zero_debug(*args: Any, stacklevel: int = 4, **kwargs: Any) -> None:
    """Log to ``milepost`` at the level DEBUG."""
    _log.debug(*args, stacklevel=stacklevel - 1, **kwargs)


@rank_zero_only
def rank_zero_info(*args: Any, stacklevel: int = 4, **kwargs: Any) -> None:
    """Log to ``milepost`` at the level INFO."""
    _log.info(*args, stacklevel=stacklevel - 1, **kwargs)


# Lightning has one function more between the caller and the warning, and its users count their levels by that.
@rank_zero_only
def rank_zero_warn(message: str | Warning, stacklevel: int = 4, **kwargs: Any) -> None:
    """Warn; the default `stacklevel` points at the caller."""
    warnings.warn(message, stacklevel=stacklevel - 1, **kwargs)


@rank_zero_only
def rank_zero_deprecation(message: str | Warning, stacklevel: int = 5, **kwargs: Any) -> None:
    """Warn of what will go."""
    warnings.warn(message, stacklevel=stacklevel - 2, **{"category": DeprecationWarning, **kwargs})
