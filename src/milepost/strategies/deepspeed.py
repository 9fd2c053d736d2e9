"""Training with DeepSpeed's ZeRO, and its checkpoints through any CheckpointIO."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from milepost import _optional
from milepost.errors import CheckpointSaveError, MisconfigurationException, ResumeError
from milepost.plugins.io import parts, zero
from milepost.plugins.io.checkpoint_io import Completed
from milepost.plugins.io.deepspeed_engine import CheckpointIOEngine
from milepost.precision.deepspeed import DeepSpeedPrecision
from milepost.strategies import deepspeed_config, saving
from milepost.strategies.ddp import refuse
from milepost.strategies.deepspeed_model import EngineOptimizer, full_weights, made_whole, redirected_forward
from milepost.strategies.parallel import ParallelStrategy

if TYPE_CHECKING:
    from milepost.plugins.io.checkpoint_io import Pending
    from milepost.precision.precision import Precision
    from milepost.trainer.trainer import Trainer

_TAG = "parts"  # of the directory that DeepSpeed believes to write to


class DeepSpeedStrategy(ParallelStrategy):
    """Train with DeepSpeed: ZeRO shards the optimizer (stage 1), gradients too (2), parameters too (3), or nothing (0).

    Each file that DeepSpeed saves or loads goes through `checkpoint_io`, and a checkpoint is removed through it. It
    counts once the parts of all ranks are durable (milepost.plugins.io.parts). A run that goes on at the same stage,
    precision and number of ranks takes all of it back; any other run, one on a single device too, reads the full fp32
    weights and moments out of it.

    Args:
        zero_optimization, stage: which ZeRO.
        checkpoint_io: how the parts of checkpoints are stored.
        config: DeepSpeed's own, a dict or the path of a JSON file; `stage` and `options` then count for nothing.
        exclude_frozen_parameters: leave parameters that are not trained out of checkpoints.
        logging_level: of DeepSpeed's logger.
        process_group_backend, timeout: as `ParallelStrategy` has them.
        accelerator, parallel_devices, cluster_environment, precision_plugin: what Lightning's takes there is given to
            the Trainer here; anything but None is refused.
        options: what Lightning's strategy takes, such as ``offload_optimizer=True`` or ``reduce_bucket_size``.

    Raises:
        MissingDependencyError: DeepSpeed is not installed.
        MisconfigurationException: an argument that is unknown, or that no CheckpointIO can honour; it names the
            alternative.
    """

    def __init__(
        self,
        accelerator: Any = None,
        zero_optimization: bool = True,
        stage: int = 2,
        checkpoint_io: Any = None,
        config: Any = None,
        exclude_frozen_parameters: bool = False,
        logging_level: int = logging.WARNING,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        parallel_devices: Any = None,
        cluster_environment: Any = None,
        precision_plugin: Any = None,
        **options: Any,
    ) -> None:
        refuse(
            accelerator=(accelerator, "Trainer(accelerator=...)"),
            parallel_devices=(parallel_devices, "Trainer(devices=...)"),
            cluster_environment=(cluster_environment, "torchrun, which tells each process its rank"),
            precision_plugin=(precision_plugin, "Trainer(precision=...)"),
        )
        super().__init__(checkpoint_io, process_group_backend, timeout)
        self.config = deepspeed_config.build(config, zero_optimization, stage, options)
        if not _optional.available("deepspeed"):
            _require()
        self._exclude_frozen = exclude_frozen_parameters
        self._logging_level = logging_level
        self._precision = DeepSpeedPrecision()
        self._engine: Any = None
        self._files: CheckpointIOEngine | None = None
        self._layout: dict[str, Any] = {}
        self._restoring: parts.Parts | None = None  # the checkpoint that this run goes on from, at its own layout
        self._masters: dict[str, Any] = {}  # weights in fp32 of a checkpoint of another layout
        self._fits = False

    # ---- processes and precision -----------------------------------------------------------------------------------

    def make_precision(self, precision: str | int | None) -> DeepSpeedPrecision:
        self._precision = DeepSpeedPrecision(precision)
        return self._precision

    def check_precision(self, precision: Precision) -> None:
        if not isinstance(precision, DeepSpeedPrecision):
            raise MisconfigurationException(
                f"plugins=[{type(precision).__name__}(...)]: DeepSpeed casts and scales itself. Give"
                " Trainer(precision=...) instead."
            )

    def launch(self) -> None:
        if self.root_device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        super().launch()
        deepspeed = _require()
        logging.getLogger("DeepSpeed").setLevel(self._logging_level)
        os.environ.setdefault("LOCAL_RANK", "0")
        deepspeed.init_distributed(
            dist_backend="gloo" if self.root_device.type == "cpu" else "nccl", auto_mpi_discovery=False
        )

    @property
    def model(self) -> Any:
        """DeepSpeed's engine while it trains, else the module itself."""
        return self._lightning_module if self._engine is None else self._engine

    @property
    def stage(self) -> int:
        return deepspeed_config.stage_of(self.config)

    # ---- setting up ------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn != "fit":
            self._lightning_module.to(self._precision.dtype)

    def take_optimizers(self, trainer: Trainer) -> None:
        """Hand model and optimizer to DeepSpeed, and put back what the checkpoint holds of both."""
        module = self._lightning_module
        if not module.automatic_optimization:
            raise MisconfigurationException(
                "DeepSpeed steps its one optimizer itself: optimizing by hand (automatic_optimization = False) needs"
                " strategy='ddp'."
            )
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"DeepSpeed trains with one optimizer, configure_optimizers returned {len(trainer.optimizers)}."
            )
        self._layout = self._described(trainer.optimizers[0])
        if self._restoring is not None:
            self._require_layout()
        config = deepspeed_config.completed(
            self.config,
            precision=self._precision.precision,
            accumulate=trainer.accumulate_grad_batches,
            clip=trainer.gradient_clip_val,
            batch_size=1,
        )
        optimizer = trainer.optimizers[0]
        self._engine = _require().initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )[0]
        if getattr(self._engine, "has_moe_layers", False):
            raise MisconfigurationException("DeepSpeed's mixture-of-experts layers are not supported. Use FSDP.")
        self._files = CheckpointIOEngine(self.checkpoint_io)
        self._engine.checkpoint_engine = self._files
        trainer.optimizers = [EngineOptimizer(self._engine, optimizer)]  # type: ignore[list-item]
        self._put_back(trainer.ckpt_path)

    def _described(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        names = {parameter: name for name, parameter in self._lightning_module.named_parameters()}
        groups = [[names.get(p, f"?{n}") for n, p in enumerate(g["params"])] for g in optimizer.param_groups]
        trained = [names[p] for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        return {
            "stage": self.stage,
            "ranks": self.world_size,
            "precision": str(self._precision.dtype),
            "groups": groups,
            "trained": trained,
        }

    # ---- steps -----------------------------------------------------------------------------------------------------

    def run_training_step(self, call: Callable[..., Any], *arguments: Any) -> Any:
        if self._engine is None:
            return call(*arguments)
        with redirected_forward(self._lightning_module, call):
            return self._engine(*arguments)

    def run_backward(self, loss: torch.Tensor, *arguments: Any, **options: Any) -> None:
        if self._engine is None:
            super().run_backward(loss, *arguments, **options)
        else:
            self._engine.backward(loss, scale_wrt_gas=False)

    def before_evaluation(self) -> None:
        self._share_buffers()

    def _share_buffers(self) -> None:
        """Give every rank rank 0's buffers, which are stored: DeepSpeed leaves each rank its own."""
        if self._engine is not None and self.world_size > 1:
            for buffer in self._lightning_module.buffers():
                torch.distributed.broadcast(buffer, src=0)

    @contextmanager
    def _accumulating(self) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def without_gradient_sync(self) -> AbstractContextManager[Any]:
        return super().without_gradient_sync() if self._engine is None else self._accumulating()

    # ---- saving ----------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's weights; nothing at stage 3, where each rank has a piece of each, which DeepSpeed saves."""
        return {} if self._engine is not None and self.stage == 3 else super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {} if self._engine is not None else super().optimizer_state(optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str, storage_options: Any = None) -> Pending:
        """Let DeepSpeed save its parts, and `checkpoint` beside them as the record. Called on every rank; blocks.

        Raises:
            CheckpointSaveError: a part failed on one rank; raised on every rank.
            TypeError: `storage_options` was given.
        """
        if self._engine is None or "optimizer_states" not in checkpoint:
            if self._engine is not None and self.stage == 3:
                checkpoint = {**checkpoint, "state_dict": full_weights(self._lightning_module)}
            return super().save_checkpoint(checkpoint, filepath, storage_options)
        if storage_options is not None:
            raise TypeError(f"storage_options={storage_options!r} is not supported with DeepSpeed. Leave it out.")
        assert self._files is not None
        self._share_buffers()
        self._tell_of_gradients()
        beside = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        record = {**saving.gathered(beside), zero.LAYOUT: self._layout}
        weights = None if self.stage == 3 or self._exclude_frozen else checkpoint["state_dict"]
        with tempfile.TemporaryDirectory() as stage, self._files.saving(filepath, stage, record, weights):
            self._engine.save_checkpoint(
                stage, tag=_TAG, save_latest=False, exclude_frozen_parameters=self._exclude_frozen
            )
        return Completed(filepath)

    def _tell_of_gradients(self) -> None:
        trainer = self._lightning_module.trainer
        in_engine = self.stage > 0 or self._precision.dtype is not torch.float32
        if in_engine and trainer.fit_loop.gradients_pending:
            trainer.warn_once(
                "A checkpoint was saved inside accumulation: DeepSpeed keeps what it has added up to itself, so a run"
                " that goes on from there steps with the gradients of the batches that follow only. Save at a"
                " multiple of accumulate_grad_batches."
            )

    def save_checkpoint_alone(self, checkpoint: dict[str, Any], filepath: str) -> Pending:
        if self.world_size == 1:
            return self.save_checkpoint(checkpoint, filepath)
        raise CheckpointSaveError(
            "DeepSpeed saves with all ranks together, which is impossible once an error has ended the run on one of"
            " them. Go on from the newest checkpoint.",
            path=filepath,
            step=checkpoint.get("global_step"),
        )

    # ---- loading ---------------------------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint_path: str, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint. Of one that DeepSpeed takes back itself, only the record: the rest follows in the set-up.

        Raises:
            ResumeError: it is of another layout, so DeepSpeed cannot take back the optimizer's state.
        """
        self._restoring, self._masters = None, {}
        self._fits = self._lightning_module.trainer.state.fn == "fit"
        takes_optimizer = self._fits and "optimizer" in self.parts_to_restore
        if takes_optimizer and parts.is_there(self.checkpoint_io, checkpoint_path):
            record, self._restoring = parts.read(self.checkpoint_io, checkpoint_path, weights_only)
            self._saved_layout = record.pop(zero.LAYOUT, {})
            return {**record, "state_dict": {}, "optimizer_states": [{}]}
        loaded = super().load_checkpoint(checkpoint_path, weights_only)
        if takes_optimizer and "optimizer_states" in loaded:
            raise ResumeError(
                f"{checkpoint_path} was not saved by DeepSpeed, which cannot take back another optimizer's state."
                " Go on from its weights with fit(restore={'model'}), or without DeepSpeed."
            )
        if self._fits and self._precision.dtype is not torch.float32:
            self._masters = dict(loaded.get("state_dict", {}))
        return loaded

    @property
    def restores_model(self) -> bool:
        return self._restoring is not None

    @property
    def restores_optimizer(self) -> bool:
        return self._fits

    def _require_layout(self) -> None:
        """DeepSpeed itself refuses another number of ranks, and takes another stage's files for its own."""
        for key in ("stage", "ranks", "precision", "groups"):
            saved, present = self._saved_layout.get(key), self._layout[key]
            if saved != present:
                self._restoring = None
                raise ResumeError(
                    f"The checkpoint was saved by DeepSpeed with {key}={saved!r}, and this run has {key}={present!r}:"
                    " DeepSpeed takes back the optimizer's state at the same layout only. Go on at that one, take the"
                    " weights alone with fit(restore={'model'}), or go on without DeepSpeed, which reads all of it."
                )

    def _put_back(self, path: str | None) -> None:
        if self._restoring is not None and path is not None and self._files is not None:
            found, self._restoring = self._restoring, None
            strict = self._lightning_module.strict_loading and not self._exclude_frozen
            with (
                tempfile.TemporaryDirectory() as stage,
                self._files.loading(path, stage, found) as tag,
            ):
                self._engine.load_checkpoint(stage, tag=tag, load_module_strict=strict)
        if self._masters and self.stage > 0:
            masters, self._masters = self._masters, {}
            for name, parameter in self._lightning_module.named_parameters():
                if parameter.requires_grad and name in masters:
                    _require("deepspeed.utils").safe_set_full_fp32_param(parameter, masters[name].float())

    # ---- the end ---------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Take the model out of DeepSpeed's hands, whole; after an error it stays as it is, since ranks cannot meet."""
        engine, self._engine = self._engine, None
        if engine is not None:
            whole = self._lightning_module.trainer.state.status != "interrupted"
            if self.stage == 3 and whole:
                made_whole(self._lightning_module, engine)
            else:
                engine.destroy()
        self._files = None
        super().teardown()


def _require(module: str = "deepspeed") -> Any:
    return _optional.require(module, extra="deepspeed", needed_by="DeepSpeedStrategy")
