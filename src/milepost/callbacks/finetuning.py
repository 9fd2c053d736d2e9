"""Freeze part of a model and train it from a later epoch on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from milepost.callbacks.callback import Callback
from milepost.errors import MisconfigurationException, ResumeError

if TYPE_CHECKING:
    from milepost.trainer.module import Module
    from milepost.trainer.trainer import Trainer

Modules = nn.Module | Iterable[Any]
_log = logging.getLogger("milepost")


def multiplicative(epoch: int) -> float:
    """The default schedule of `BackboneFinetuning`: twice the rate each epoch."""
    return 2.0


class BaseFinetuning(Callback):
    """Derive from this, freeze in `freeze_before_training`, and unfreeze in `finetune_function`.

    `configure_optimizers` gets to see the frozen module: give its optimizer the parameters with ``requires_grad``.

    The checkpoint holds which parameters stand in which group of which optimizer, which are trained, and which batch
    norm layers gather statistics, so that a run that goes on after the unfreezing trains the same parameters.
    """

    def __init__(self) -> None:
        self._internal_optimizer_metadata: dict[int, list[dict[str, Any]]] = {}
        self._restored: dict[str, Any] | None = None
        self._module: Callable[[], Module | None] = lambda: None

    def freeze_before_training(self, pl_module: Module) -> None:
        """Freeze what is not to be trained yet. Called before `configure_optimizers`, at a resume too."""
        raise NotImplementedError(
            f"{type(self).__name__} has no `freeze_before_training(pl_module)`: define it, and call"
            " self.freeze(modules) in it."
        )

    def finetune_function(self, pl_module: Module, epoch: int, optimizer: Optimizer) -> None:
        """Unfreeze what is due at `epoch` (from 0). Called for each optimizer when an epoch begins."""
        raise NotImplementedError(
            f"{type(self).__name__} has no `finetune_function(pl_module, epoch, optimizer)`: define it, and call"
            " self.unfreeze_and_add_param_group(modules, optimizer) in it when the epoch has come."
        )

    # ---- freezing ------------------------------------------------------------------------------------------------

    @staticmethod
    def flatten_modules(modules: Modules) -> list[nn.Module]:
        """The modules in `modules` (one, or a nested collection) that hold parameters themselves or have no parts."""
        if isinstance(modules, nn.ModuleDict):
            modules = modules.values()
        if isinstance(modules, Iterable):
            found = [part for item in modules for part in BaseFinetuning.flatten_modules(item)]
        else:
            found = list(modules.modules())
        return [m for m in found if not list(m.children()) or any(True for _ in m.parameters(recurse=False))]

    @staticmethod
    def filter_params(modules: Modules, train_bn: bool = True, requires_grad: bool = True) -> Iterator[nn.Parameter]:
        """The parameters of `modules` whose ``requires_grad`` is as given; without batch norm if not `train_bn`."""
        for module in BaseFinetuning.flatten_modules(modules):
            if train_bn or not isinstance(module, _BatchNorm):
                yield from (p for p in module.parameters(recurse=False) if p.requires_grad == requires_grad)

    @staticmethod
    def make_trainable(modules: Modules) -> None:
        """Train the parameters of `modules`, and let their batch norm gather statistics."""
        for module in BaseFinetuning.flatten_modules(modules):
            _set_trained(module, True)

    @staticmethod
    def freeze_module(module: nn.Module) -> None:
        """Do not train `module`'s own parameters; if it is batch norm, leave its statistics as they are."""
        _set_trained(module, False)

    @staticmethod
    def freeze(modules: Modules, train_bn: bool = True) -> None:
        """Do not train the parameters of `modules`; with `train_bn` those of batch norm are trained all the same."""
        for module in BaseFinetuning.flatten_modules(modules):
            _set_trained(module, train_bn and isinstance(module, _BatchNorm))

    @staticmethod
    def filter_on_optimizer(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Those of `params` that `optimizer` does not have yet. Warns where it has one of them."""
        present = {p for group in optimizer.param_groups for p in group["params"]}
        given = list(params)
        new = [p for p in given if p not in present]
        if len(new) < len(given):
            warnings.warn(
                f"{len(given) - len(new)} of the {len(given)} parameters to unfreeze are in {type(optimizer).__name__}"
                " already and stay where they are. In configure_optimizers give it only the parameters with"
                " requires_grad.",
                stacklevel=3,
            )
        return new

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: Modules,
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Train `modules`, and give their parameters to `optimizer` as a new group.

        Args:
            lr: learning rate of the group; that of the first group divided by `initial_denom_lr` if None.
            train_bn: give the optimizer the parameters of batch norm too.
        """
        trained = set(BaseFinetuning.filter_params(modules))
        BaseFinetuning.make_trainable(modules)
        present = {p for group in optimizer.param_groups for p in group["params"]}
        # What was trained all the time, such as batch norm, is where it belongs; only what was frozen is news.
        wanted = [p for p in BaseFinetuning.filter_params(modules, train_bn) if not (p in trained and p in present)]
        if new := BaseFinetuning.filter_on_optimizer(optimizer, wanted):
            rate = optimizer.param_groups[0]["lr"] / initial_denom_lr if lr is None else float(lr)
            optimizer.add_param_group({"params": new, "lr": rate})

    # ---- the run -------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._module = ref(pl_module)
        self.freeze_before_training(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        restored, self._restored = self._restored, None
        if restored is None:
            self._internal_optimizer_metadata = {}
            return
        parameters = dict(pl_module.named_parameters())
        for index, optimizer in enumerate(trainer.optimizers):
            if index in self._internal_optimizer_metadata:
                before = {p for group in optimizer.param_groups for p in group["params"]}
                optimizer.param_groups = _with_parameters(self._internal_optimizer_metadata[index], parameters)
                # Lightning's files do not say what is trained: what it has added since is.
                added = {p for group in optimizer.param_groups for p in group["params"]} - before
                for module in pl_module.modules():
                    if any(p in added for p in module.parameters(recurse=False)):
                        _set_trained(module, True)
        _apply_trained(pl_module, restored.get("trained", {}))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        trainer.finish_staging()  # it may give the layers that it unfreezes other weights
        for index, optimizer in enumerate(trainer.optimizers):
            self.finetune_function(pl_module, trainer.current_epoch, optimizer)
            self._internal_optimizer_metadata[index] = [
                {**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups
            ]

    # ---- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        module = self._module()
        return {
            "internal_optimizer_metadata": self._internal_optimizer_metadata,
            "trained": {} if module is None else _trained(module),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
        self._internal_optimizer_metadata = dict(state_dict["internal_optimizer_metadata"])


class BackboneFinetuning(BaseFinetuning):
    """Trains the module's ``backbone`` from a given epoch on, at a learning rate that grows up to the others'.

    Args:
        unfreeze_backbone_at_epoch: index from 0 of the epoch at which the backbone begins to be trained.
        lambda_func: from the index of the next epoch to the factor by which the backbone's rate grows.
        backbone_initial_ratio_lr: the backbone's first rate as a fraction of the first group's.
        backbone_initial_lr: the backbone's first rate itself.
        should_align: never let the backbone's rate exceed the first group's.
        initial_denom_lr: unused where `backbone_initial_lr` or `backbone_initial_ratio_lr` says the rate, which is
            always; taken for Lightning's sake.
        train_bn: give the optimizer the backbone's batch norm too.
        verbose: log both rates, at each epoch, rounded to `rounding` digits.

    Raises:
        MisconfigurationException: when fit starts: the module has no ``backbone``.
    """

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = multiplicative,
        backbone_initial_ratio_lr: float = 10e-2,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ) -> None:
        super().__init__()
        self.unfreeze_backbone_at_epoch = unfreeze_backbone_at_epoch
        self.lambda_func = lambda_func
        self.backbone_initial_ratio_lr = backbone_initial_ratio_lr
        self.backbone_initial_lr = backbone_initial_lr
        self.should_align = should_align
        self.initial_denom_lr = initial_denom_lr
        self.train_bn = train_bn
        self.verbose = verbose
        self.rounding = rounding
        self.previous_backbone_lr: float | None = None

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if not isinstance(getattr(pl_module, "backbone", None), nn.Module):
            raise MisconfigurationException(
                f"BackboneFinetuning needs a module named `backbone`, which {type(pl_module).__name__} does not have."
                " Name the part to unfreeze so, or derive from BaseFinetuning."
            )
        super().setup(trainer, pl_module, stage)

    def freeze_before_training(self, pl_module: Module) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Module, epoch: int, optimizer: Optimizer) -> None:
        if epoch < self.unfreeze_backbone_at_epoch:
            return
        current = float(optimizer.param_groups[0]["lr"])
        if epoch == self.unfreeze_backbone_at_epoch:
            given = self.backbone_initial_lr
            rate = current * self.backbone_initial_ratio_lr if given is None else given
            self.unfreeze_and_add_param_group(
                pl_module.backbone,
                optimizer,
                rate,
                train_bn=self.train_bn,
                initial_denom_lr=self.initial_denom_lr,
            )
        else:
            if self.previous_backbone_lr is None:
                raise ResumeError(
                    f"BackboneFinetuning is at epoch {epoch}, but has not unfrozen the backbone at epoch"
                    f" {self.unfreeze_backbone_at_epoch}: the run went on from a checkpoint without its state."
                )
            rate = self.lambda_func(epoch + 1) * self.previous_backbone_lr
            if self.should_align:
                rate = min(rate, current)
            optimizer.param_groups[-1]["lr"] = rate
        self.previous_backbone_lr = rate
        if self.verbose:
            _log.info("Current lr: %s, Backbone lr: %s", round(current, self.rounding), round(rate, self.rounding))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "previous_backbone_lr": self.previous_backbone_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.previous_backbone_lr = state_dict["previous_backbone_lr"]


def _set_trained(module: nn.Module, trained: bool) -> None:
    if isinstance(module, _BatchNorm):
        module.track_running_stats = trained
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad = trained


def _trained(module: nn.Module) -> dict[str, bool]:
    """By name: whether each parameter is trained, and whether each batch norm layer gathers statistics."""
    parameters = {name: p.requires_grad for name, p in module.named_parameters()}
    norms = {name: m.track_running_stats for name, m in module.named_modules() if isinstance(m, _BatchNorm)}
    return {**parameters, **norms}


def _apply_trained(module: nn.Module, trained: dict[str, bool]) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad = trained.get(name, parameter.requires_grad)
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm):
            part.track_running_stats = trained.get(name, part.track_running_stats)


def _with_parameters(groups: list[dict[str, Any]], parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups whose ``params`` are names, with the parameters themselves.

    Raises:
        ResumeError: the module has no parameter of that name.
    """
    if unknown := sorted({name for group in groups for name in group["params"]} - set(parameters)):
        raise ResumeError(
            f"The checkpoint's optimizer trains {unknown[0]!r}, which this module does not have. Use the module that"
            " was trained, or load the weights alone with load_from_checkpoint."
        )
    return [{**group, "params": [parameters[name] for name in group["params"]]} for group in groups]
