"""`CombinedLoader` at the place that Lightning users know. It lives in `milepost.data.stream`."""

from milepost.data.stream import CombinedLoader

__all__ = ["CombinedLoader"]
