"""A mesh of ranks on which the module parallelizes itself: FSDP2 in one dimension, tensor parallel in the other."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from milepost.errors import MisconfigurationException
from milepost.plugins.io import checkpoint_io as io_calls
from milepost.plugins.io.snapshot_io import SnapshotCheckpointIO
from milepost.precision.precision import Precision
from milepost.strategies.fsdp import FSDPStrategy, is_sharded
from milepost.strategies.parallel import ParallelStrategy

if TYPE_CHECKING:
    from milepost.trainer.trainer import Trainer


class ModelParallelStrategy(ParallelStrategy):
    """The module's `configure_model` parallelizes it, by ``self.device_mesh``.

    That mesh has the dimensions ``data_parallel``, for FSDP2, and ``tensor_parallel``.

    Args:
        data_parallel_size: ranks in that dimension, each with other data; ``"auto"``: the number of machines.
        tensor_parallel_size: ranks in the other, which share a batch; ``"auto"``: the devices of a machine.
        save_distributed_checkpoint: save each rank's part, through `SnapshotCheckpointIO` where no other plugin that
            does is given; False: whole checkpoints, through rank 0.
        process_group_backend, timeout, checkpoint_io: as for `DDPStrategy`.

    Raises:
        MisconfigurationException: a plugin that takes whole checkpoints, where parts are to be saved.
    """

    def __init__(
        self,
        data_parallel_size: int | str = "auto",
        tensor_parallel_size: int | str = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        checkpoint_io: Any = None,
    ) -> None:
        super().__init__(checkpoint_io, process_group_backend, timeout)
        self._sizes = (data_parallel_size, tensor_parallel_size)
        self._in_parts = save_distributed_checkpoint
        self._mesh: DeviceMesh | None = None
        if checkpoint_io is not None:
            self._check_plugin(checkpoint_io)

    @property
    def checkpoint_io(self) -> Any:
        if self._checkpoint_io is None and self._in_parts:
            self._checkpoint_io = SnapshotCheckpointIO()
        return super().checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: Any) -> None:
        if hasattr(self, "_in_parts"):
            self._check_plugin(io)
        ParallelStrategy.checkpoint_io.fset(self, io)  # type: ignore[attr-defined]

    def _check_plugin(self, io: Any) -> None:
        if self._in_parts and not io_calls.takes_every_rank(io):
            raise MisconfigurationException(
                f"ModelParallelStrategy with {type(io).__name__}, which takes whole checkpoints from one rank. Use"
                " SnapshotCheckpointIO, which takes each rank's part, or save_distributed_checkpoint=False."
            )

    def check_precision(self, precision: Precision) -> None:
        FSDPStrategy.check_precision(self, precision)  # type: ignore[arg-type]

    @property
    def device_mesh(self) -> DeviceMesh:
        """Of the dimensions ``data_parallel`` and ``tensor_parallel``."""
        if self._mesh is None:
            data = self.num_nodes if self._sizes[0] == "auto" else int(self._sizes[0])
            tensor = self.num_devices if self._sizes[1] == "auto" else int(self._sizes[1])
            if data * tensor != self.world_size:
                raise MisconfigurationException(
                    f"data_parallel_size={data} and tensor_parallel_size={tensor} make {data * tensor} ranks, and there"
                    f" are {self.world_size}: give sizes whose product that is."
                )
            names = ("data_parallel", "tensor_parallel")
            self._mesh = init_device_mesh(self.root_device.type, (data, tensor), mesh_dim_names=names)
        return self._mesh

    @property
    def data_ranks(self) -> int:
        return self.device_mesh["data_parallel"].size()

    @property
    def data_rank(self) -> int:
        return self.device_mesh["data_parallel"].get_local_rank()

    def shard(self, trainer: Trainer) -> None:
        module = self._lightning_module
        if not is_sharded(module):
            raise MisconfigurationException(
                f"{type(module).__name__} has no parameter that is spread over ranks: parallelize it in its"
                " configure_model, by self.device_mesh, or use FSDPStrategy, which does so by itself."
            )
        module.to(self.root_device)
        self.broadcast_tensors(module.buffers())

    def setup(self, trainer: Trainer) -> None:
        """Everything is in its place since `shard`."""

    def load_checkpoint(self, checkpoint_path: str, weights_only: bool | None = None) -> dict[str, Any]:
        return self.load_mapped(checkpoint_path, weights_only)

    def before_evaluation(self) -> None:
        self.broadcast_tensors(self._lightning_module.buffers())

    def before_saving(self) -> None:
        self.before_evaluation()
