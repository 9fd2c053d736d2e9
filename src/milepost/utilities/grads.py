"""The sizes of gradients, for logging."""

from __future__ import annotations

import torch

__all__ = ["grad_norm"]


def grad_norm(module: torch.nn.Module, norm_type: float | int | str, group_separator: str = "/") -> dict[str, float]:
    """Norms of the gradients that are there: one for each parameter, and that of all together as one vector.

    Args:
        module: whose parameters; call it between backward and the optimizer's step.
        norm_type: of which p-norm; ``"inf"`` for the largest absolute value.
        group_separator: stands between ``grad_<p>_norm`` and the parameter's name.

    Returns:
        A tensor of one value for each parameter with a gradient, and ``grad_<p>_norm_total``; none without gradients.

    Raises:
        ValueError: `norm_type` is not positive.
    """
    power = float(norm_type)
    if power <= 0:
        raise ValueError(f"norm_type={norm_type!r} must be positive, or 'inf'")
    gradients = [(name, p.grad.detach()) for name, p in module.named_parameters() if p.grad is not None]
    norms = {f"grad_{power}_norm{group_separator}{name}": gradient.norm(power) for name, gradient in gradients}
    if norms:
        norms[f"grad_{power}_norm_total"] = torch.tensor(list(norms.values())).norm(power)
    return norms
