"""A module in DeepSpeed's hands: its step in the place of its forward, its optimizer, its weights whole again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from milepost import _distributed, _optional


@contextmanager
def redirected_forward(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Inside, the next call of `module` runs `call` in the place of its forward; what `call` itself calls does not.

    DeepSpeed sees what is computed only where it is computed in the forward of the module it was given.
    """
    attributes = vars(module)
    before = attributes.get("forward")

    def restore() -> None:
        if before is None:
            attributes.pop("forward", None)
        else:
            attributes["forward"] = before

    def once(*arguments: Any) -> Any:
        restore()
        return call(*arguments)

    attributes["forward"] = once
    try:
        yield
    finally:
        restore()


class EngineOptimizer:
    """What the Trainer steps: DeepSpeed's engine, seen as the optimizer that the module has configured."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        self._engine = engine
        self.optimizer = optimizer

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        return type(self.optimizer)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run `closure`, then step with the gradients that the engine has gathered."""
        result = None if closure is None else closure()
        self._engine.step()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: the engine clears its gradients after each step."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def full_weights(module: nn.Module) -> dict[str, Any]:
    """The module's state dict at stage 3, gathered tensor by tensor, on rank 0; elsewhere without its parameters."""
    weights = module.state_dict()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            with _gathered(parameter):
                if _distributed.rank() == 0:
                    weights[name] = parameter.detach().cpu().clone()
    return weights


def made_whole(module: nn.Module, engine: Any) -> None:
    """Give `module` ordinary parameters again, with what the ranks have of each, and let go of the engine.

    At stage 3 DeepSpeed leaves pieces in the place of parameters, in dicts of its own. A collective.
    """
    whole: dict[nn.Parameter, nn.Parameter] = {}
    with torch.no_grad():
        for parameter in module.parameters():
            with _gathered(parameter):
                whole[parameter] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    engine.destroy()
    for part in module.modules():
        own = OrderedDict((name, None if p is None else whole[p]) for name, p in part._parameters.items())
        vars(part)["_parameters"] = dict(own)


def _gathered(parameter: nn.Parameter) -> Any:
    deepspeed = _optional.require("deepspeed", extra="deepspeed", needed_by="DeepSpeedStrategy")
    return deepspeed.zero.GatheredParameters([parameter])
