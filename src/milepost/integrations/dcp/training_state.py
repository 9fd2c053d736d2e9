"""`TrainingState`: a model and its optimizers as one object that DCP, and a `Checkpointer`, save and load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer


class TrainingState(Stateful):
    """What a training loop saves: to be subclassed by those who have more.

    ::

        class Mine(TrainingState):
            def state_dict(self):
                return {**super().state_dict(), "step": self.step}

            def load_state_dict(self, state_dict):
                self.step = state_dict.pop("step")
                super().load_state_dict(state_dict)

        dcp.save({"training": Mine(model, optimizer)}, storage_writer=MilepostWriter(path))

    Optimizer state goes by the names of the parameters, so that it fits whatever the number of ranks and however they
    are sharded.

    Args:
        model: sharded or not.
        optimizers: over parameters of `model`.
        options: torch's, as for `get_state_dict`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer] = (),
        options: StateDictOptions | None = None,
    ) -> None:
        self.model = model
        self.optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        self.options = options

    def state_dict(self) -> dict[str, Any]:
        """The model's state, and that of the optimizers as one."""
        model, optimizer = get_state_dict(self.model, self.optimizers, options=self.options)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` gave; an optimizer that has not stepped yet gets its state here."""
        set_state_dict(
            self.model,
            self.optimizers,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
            options=self.options,
        )
