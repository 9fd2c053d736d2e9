"""The environments a job runs in, under the names that Lightning's users import."""

from milepost._lazy import lazy_names

_NAMES = {"SLURMEnvironment": "milepost.plugins.preemption"}
__all__ = sorted(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
