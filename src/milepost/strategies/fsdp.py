"""The model's parameters spread over the ranks, each of which holds a part: torch's FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from milepost import _distributed
from milepost.errors import MisconfigurationException
from milepost.plugins.io import checkpoint_io as io_calls
from milepost.plugins.io.snapshot_io import SnapshotCheckpointIO
from milepost.precision.precision import Precision
from milepost.strategies.ddp import refuse
from milepost.strategies.parallel import ParallelStrategy

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
_RESHARDS = {"FULL_SHARD": True, "SHARD_GRAD_OP": False, "HYBRID_SHARD": True, "_HYBRID_SHARD_ZERO2": False}
_WITHOUT_EFFECT = {"use_orig_params": True, "limit_all_gathers": True, "forward_prefetch": False}
_FSDP2_OPTIONS = ("shard_placement_fn", "ignored_params")


class FSDPStrategy(ParallelStrategy):
    """Shard parameters, gradients and optimizer state over all ranks.

    The arguments are those of Lightning, which were made for torch's first FSDP: each is mapped to what FSDP2 has for
    it, or refused. Gradients are reduced after every batch, also where several are accumulated, so that a checkpoint
    inside accumulation has them.

    Args:
        checkpoint_io: how checkpoints are stored. `SnapshotCheckpointIO` writes each rank's part as it is; any other
            gets whole tensors, gathered one after the other into the memory of rank 0's host.
        cpu_offload: keep parameters and optimizer state in host memory: True, or FSDP's ``CPUOffload``.
        mixed_precision: FSDP2's ``MixedPrecisionPolicy``, or the ``MixedPrecision`` of torch's first FSDP.
        auto_wrap_policy: which parts are gathered one by one: classes of modules, a function of a module, or a policy
            of torch's first FSDP. None: the module is gathered as a whole.
        sharding_strategy: ``"FULL_SHARD"``; ``"SHARD_GRAD_OP"``, which keeps parameters gathered between forward and
            backward; ``"HYBRID_SHARD"``, which shards within each machine and replicates among them.
        state_dict_type: ``"full"``, or ``"sharded"``: then `SnapshotCheckpointIO`, which does so, is the default.
        device_mesh: the ranks as a mesh, or its shape ``(replicas, shards)``.
        process_group_backend, timeout: as for `DDPStrategy`.
        fsdp_options: ``shard_placement_fn`` and ``ignored_params`` go to ``fully_shard``.

    Raises:
        MisconfigurationException: what FSDP2 does not have; the message names the remedy.
    """

    def __init__(
        self,
        accelerator: Any = None,
        parallel_devices: Any = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        cpu_offload: Any = None,
        mixed_precision: Any = None,
        auto_wrap_policy: Any = None,
        activation_checkpointing: Any = None,
        activation_checkpointing_policy: Any = None,
        sharding_strategy: Any = "FULL_SHARD",
        state_dict_type: str = "full",
        device_mesh: Any = None,
        **fsdp_options: Any,
    ) -> None:
        super().__init__(checkpoint_io, process_group_backend, timeout)
        in_model = "torch.utils.checkpoint in the forward of what is to be computed again"
        refuse(
            accelerator=(accelerator, "Trainer(accelerator=...)"),
            parallel_devices=(parallel_devices, "Trainer(devices=...)"),
            cluster_environment=(cluster_environment, "torchrun, which tells each process its rank"),
            precision_plugin=(precision_plugin, "Trainer(precision=...) or Trainer(plugins=...)"),
            activation_checkpointing=(activation_checkpointing, in_model),
            activation_checkpointing_policy=(activation_checkpointing_policy, in_model),
        )
        self._offload = _offload_policy(cpu_offload)
        self._mixed = _mixed_policy(mixed_precision)
        self._wrap = _wrap_policy(auto_wrap_policy)
        self._kind = _sharding(sharding_strategy)
        if state_dict_type not in ("full", "sharded"):
            raise MisconfigurationException(f"state_dict_type={state_dict_type!r}: use 'full' or 'sharded'.")
        self._sharded_state = state_dict_type == "sharded"
        if checkpoint_io is not None:
            self._check_plugin(checkpoint_io)
        for name, value in fsdp_options.items():
            if name not in _FSDP2_OPTIONS and (name not in _WITHOUT_EFFECT or _WITHOUT_EFFECT[name] != value):
                raise MisconfigurationException(
                    f"{name}={value!r} is not an option of FSDP2 (torch.distributed.fsdp.fully_shard). Leave it out, or"
                    " call fully_shard yourself in configure_model, as you like."
                )
        self._options = {name: fsdp_options[name] for name in _FSDP2_OPTIONS if name in fsdp_options}
        self._mesh_shape = device_mesh if isinstance(device_mesh, tuple) else None
        self._mesh: DeviceMesh | None = None if isinstance(device_mesh, tuple) else device_mesh

    # ---- the plugin ----------------------------------------------------------------------------------------------

    @property
    def checkpoint_io(self) -> Any:
        if self._checkpoint_io is None and self._sharded_state:
            self._checkpoint_io = SnapshotCheckpointIO()
        return super().checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: Any) -> None:
        if hasattr(self, "_sharded_state"):
            self._check_plugin(io)
        ParallelStrategy.checkpoint_io.fset(self, io)  # type: ignore[attr-defined]

    def _check_plugin(self, io: Any) -> None:
        if self._sharded_state and not io_calls.takes_every_rank(io):
            raise MisconfigurationException(
                f"state_dict_type='sharded' with {type(io).__name__}, which takes whole checkpoints from one rank. Use"
                " SnapshotCheckpointIO, which takes each rank's part, or state_dict_type='full'."
            )

    def check_precision(self, precision: Precision) -> None:
        if precision.scaler is not None:
            raise MisconfigurationException(
                f"precision={precision.precision!r} scales gradients, which FSDP2 does not do: use 'bf16-mixed', or"
                " FSDPStrategy(mixed_precision=MixedPrecisionPolicy(param_dtype=torch.bfloat16))."
            )

    # ---- sharding ------------------------------------------------------------------------------------------------

    @property
    def device_mesh(self) -> DeviceMesh:
        """The ranks in rows of which each holds one replica; one row where nothing is replicated."""
        if self._mesh is None:
            kind = self.root_device.type
            if self._kind.startswith(("HYBRID", "_HYBRID")) or self._mesh_shape is not None:
                shape = self._mesh_shape or (self.num_nodes, self.num_devices)
                self._mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
            else:
                self._mesh = init_device_mesh(kind, (_distributed.world_size(),), mesh_dim_names=("shard",))
        return self._mesh

    def shard(self, trainer: Trainer) -> None:
        module = self._lightning_module
        if not is_sharded(module):
            if any(parameter.is_meta for parameter in module.parameters()):
                raise MisconfigurationException(
                    "The module has parameters on the meta device, which nobody has filled. Build it on a real device,"
                    " or shard and fill it yourself in configure_model."
                )
            module.to("cpu" if isinstance(self._offload, CPUOffloadPolicy) else self.root_device)
            self.broadcast_tensors(module.parameters())
            self._shard(module)
        self.broadcast_tensors(module.buffers())
        if isinstance(module, FSDPModule):
            for name in _STEPS:
                if name in trainer.steps_defined and not hasattr(getattr(module, name), "__wrapped__"):
                    forward_of: Any = register_fsdp_forward_method
                    forward_of(module, name)

    def _shard(self, module: nn.Module) -> None:
        options = {"mesh": self.device_mesh, "mp_policy": self._mixed, "offload_policy": self._offload, **self._options}
        for part in reversed([part for part in module.modules() if part is not module and self._wrap(part)]):
            fully_shard(part, reshard_after_forward=_RESHARDS[self._kind], **options)
        fully_shard(module, **options)

    def setup(self, trainer: Trainer) -> None:
        """Everything is in its place since `shard`."""

    def load_checkpoint(self, checkpoint_path: str, weights_only: bool | None = None) -> dict[str, Any]:
        return self.load_mapped(checkpoint_path, weights_only)

    def before_evaluation(self) -> None:
        self.broadcast_tensors(self._lightning_module.buffers())

    def before_saving(self) -> None:
        self.before_evaluation()


def is_sharded(module: nn.Module) -> bool:
    """Whether it has been sharded or parallelized already, by `configure_model` or an earlier run."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def _offload_policy(given: Any) -> OffloadPolicy:
    if isinstance(given, OffloadPolicy):
        return given
    return CPUOffloadPolicy() if getattr(given, "offload_params", given) else OffloadPolicy()


def _mixed_policy(given: Any) -> MixedPrecisionPolicy:
    if given is None or isinstance(given, MixedPrecisionPolicy):
        return given or MixedPrecisionPolicy()
    if not hasattr(given, "param_dtype"):
        raise MisconfigurationException(
            f"mixed_precision={given!r}: give torch.distributed.fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16)."
        )
    if getattr(given, "buffer_dtype", None) not in (None, torch.float32) or getattr(
        given, "keep_low_precision_grads", False
    ):
        raise MisconfigurationException(
            f"mixed_precision={given!r}: FSDP2 leaves buffers as they are and keeps gradients in the parameters' type."
            " Leave buffer_dtype and keep_low_precision_grads out."
        )
    return MixedPrecisionPolicy(param_dtype=given.param_dtype, reduce_dtype=given.reduce_dtype)


def _sharding(given: Any) -> str:
    name = str(getattr(given, "name", given)).upper()
    if name == "NO_SHARD":
        raise MisconfigurationException("sharding_strategy='NO_SHARD' shards nothing: use DDPStrategy.")
    if name not in _RESHARDS:
        raise MisconfigurationException(f"sharding_strategy={given!r}: use one of {', '.join(_RESHARDS)}.")
    return name


def _wrap_policy(given: Any) -> Callable[[nn.Module], bool]:
    """Whether a part is sharded as a unit of its own, from any of the forms in which users say so."""
    if given is None:
        return lambda module: False
    if isinstance(given, type):
        return lambda module: isinstance(module, given)
    classes = given if isinstance(given, Iterable) else getattr(given, "_module_classes", None)  # ModuleWrapPolicy's
    if classes is not None:
        kinds = tuple(classes)
        return lambda module: isinstance(module, kinds)
    if chosen := getattr(given, "_lambda_fn", None):  # torch's CustomPolicy
        return lambda module: bool(chosen(module))
    if not callable(given):
        raise MisconfigurationException(
            f"auto_wrap_policy={given!r}: give classes of modules, such as {{Block}}, or a function of a module."
        )

    def asked(module: nn.Module) -> bool:
        try:
            size = sum(parameter.numel() for parameter in module.parameters())
            return bool(given(module=module, recurse=False, nonwrapped_numel=size))
        except TypeError:
            return bool(given(module))

    return asked
