"""Names that Lightning users import from here."""

from milepost._lazy import lazy_names

_NAMES = {
    "AttributeDict": "milepost.trainer.hparams",
    "CombinedLoader": "milepost.data.stream",
    "grad_norm": "milepost.utilities.grads",
    "move_data_to_device": "milepost.utilities.transfer",
    "rank_zero_deprecation": "milepost.utilities.rank_zero",
    "rank_zero_info": "milepost.utilities.rank_zero",
    "rank_zero_only": "milepost.utilities.rank_zero",
    "rank_zero_warn": "milepost.utilities.rank_zero",
}
__all__ = sorted(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
