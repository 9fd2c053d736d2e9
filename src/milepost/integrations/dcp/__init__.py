"""Milepost's storage for ``torch.distributed.checkpoint`` (DCP)."""

from milepost.integrations.dcp.foreign import load_distcp

__all__ = ["load_distcp"]
