"""Which parts of a module are in eval mode while it trains, such as a BatchNorm that a hook holds still."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

_COMPILED = "_orig_mod"


def parts_in_eval(module: nn.Module, modes: Mapping[nn.Module, bool] | None = None) -> list[str]:
    """Names of the parts of `module` that do not train, ``""`` for itself; by `modes` where they are put aside."""
    return [
        _plain(name)
        for name, part in module.named_modules()
        if not (part.training if modes is None else modes.get(part, part.training))
    ]


def restore_modes(module: nn.Module, in_eval: Collection[str]) -> None:
    """Put every part of `module` in the mode that `parts_in_eval` told of."""
    for name, part in module.named_modules():
        part.training = _plain(name) not in in_eval


def _plain(name: str) -> str:
    """`name` as it is without torch.compile, which puts a part of its own around what it compiles."""
    return ".".join(step for step in name.split(".") if step != _COMPILED)
