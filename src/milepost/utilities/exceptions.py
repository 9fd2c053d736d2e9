"""The exceptions under the names and the place that Lightning users know. They live in `milepost.errors`."""

from milepost.errors import MisconfigurationException, SIGTERMException

__all__ = ["MisconfigurationException", "SIGTERMException"]
