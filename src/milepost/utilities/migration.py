"""Old checkpoints brought to the present layout, under the place that Lightning users know."""

from milepost.trainer.migration import migrate_checkpoint

__all__ = ["migrate_checkpoint"]
