"""Number formats train as with pytorch-lightning, and their state goes over a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from beside import Record, check, fit, loader, module_of, plain, run

import milepost


@pytest.mark.parametrize(
    "precision",
    ["bf16-mixed", "bf16", "64-true", 64, "bf16-true", "16-true", "32-true", 32, "transformer-engine"],
    ids=str,
)
def test_same_numbers(precision: Any) -> None:
    """The types that a step sees, those that new tensors and late parameters get, and what comes of them."""

    def case(library: Any, record: Record) -> None:
        class Net(module_of(library, record)):  # type: ignore[misc]
            def configure_model(self) -> None:
                if not hasattr(self, "late"):
                    self.late = torch.nn.Linear(2, 2)
                    self.note(str(self.late.weight.dtype), self.late.weight.double().sum())

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                seen = (torch.zeros(1), batch[0], self.layer(batch[0]), self.late.weight)
                self.note([str(tensor.dtype) for tensor in seen], str(self.dtype))
                return super().training_step(batch, batch_idx)

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.note(str(torch.zeros(1).dtype))
                super().validation_step(batch, batch_idx)

        fit(library, record, Net(), loader(), loader(3, seed=2), precision=precision)

    ours, _ = check(case)
    assert (ours.error is not None) == (precision == "transformer-engine")
    assert torch.get_default_dtype() is torch.float32


def half(library: Any, **options: Any) -> dict[str, Any]:
    """fp16 on the CPU: pytorch-lightning does it only where its plugin is given."""
    if library is milepost:
        return {"precision": "16-mixed", **options}
    return {"plugins": [library.plugins.MixedPrecision("16-mixed", "cpu")], **options}


def scaled_net(library: Any, record: Record) -> Any:
    class Net(module_of(library, record)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if (self.current_epoch, batch_idx) == (0, 2) else loss  # the step is skipped

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            scale = self.trainer.precision_plugin.scaler.get_scale()
            self.note("gradients", sum(p.grad.abs().sum() for p in self.parameters()), scale)

    return Net()


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}], ids=str)
def test_a_gradient_scaler_scales_unscales_clips_and_skips(options: dict[str, Any]) -> None:
    def case(library: Any, record: Record) -> None:
        trainer = fit(
            library, record, scaled_net(library, record), loader(), loader(3, seed=2), **half(library, **options)
        )
        record.left["scaler"] = trainer.precision_plugin.scaler.state_dict()

    ours, _ = check(case)
    assert ours.left["scaler"]["scale"] < 65536.0, "the step with the infinite gradients halved it"


def test_a_skipped_batch_under_a_scaler() -> None:
    def case(library: Any, record: Record) -> None:
        class Net(module_of(library, record)):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return None if batch_idx == 2 else super().training_step(batch, batch_idx)

        fit(library, record, Net(), loader(), **half(library))

    check(case)


@pytest.mark.parametrize("resumed_by", ["milepost", "lightning"])
@pytest.mark.parametrize("written_by", ["milepost", "lightning"])
def test_the_scaler_goes_over_a_resume(written_by: str, resumed_by: str, tmp_path: Path) -> None:
    def whole(library: Any, record: Record) -> None:
        fit(library, record, scaled_net(library, record), loader(), max_epochs=2, **half(library))

    def first(library: Any, record: Record) -> None:
        trainer = fit(library, record, scaled_net(library, record), loader(), max_epochs=1, **half(library))
        trainer.save_checkpoint(tmp_path / "half.ckpt")

    def second(library: Any, record: Record) -> None:
        net = scaled_net(library, record)
        options = {**half(library), "max_epochs": 2, "enable_checkpointing": False, "logger": False}
        trainer = library.Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **options)
        trainer.fit(net, loader(), ckpt_path=tmp_path / "half.ckpt")
        record.left = {
            "weights": plain(dict(net.state_dict())),
            "scaler": trainer.precision_plugin.scaler.state_dict(),
        }

    unbroken = run(whole, resumed_by)
    assert run(first, written_by).error is None
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert saved["MixedPrecision"]["scale"] < 65536.0
    resumed = run(second, resumed_by)
    assert resumed.error is None, resumed.left
    assert resumed.left["scaler"]["scale"] == saved["MixedPrecision"]["scale"]
    assert resumed.left["weights"] == unbroken.left["weights"]


def test_double_precision_loses_no_bit_over_a_resume(tmp_path: Path) -> None:
    def ends(record: Record, *, epochs: int, ckpt_path: Any = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        net = module_of(milepost, record)()
        trainer = milepost.Trainer(
            accelerator="cpu", max_epochs=epochs, precision="64-true", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(net, loader(), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        weights: dict[str, torch.Tensor] = net.state_dict()
        return weights

    half_way = ends(Record(), epochs=1)
    assert any((value.double() != value.float().double()).any() for value in half_way.values())
    resumed, whole = ends(Record(), epochs=2, ckpt_path=tmp_path / "1.ckpt"), ends(Record(), epochs=2)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_newton_steps_and_a_scaler_are_refused_together() -> None:
    def case(library: Any, record: Record) -> None:
        class Net(module_of(library, record)):  # type: ignore[misc]
            def configure_optimizers(self) -> Any:
                return torch.optim.LBFGS(self.parameters())

        fit(library, record, Net(), loader(), **half(library))

    ours, theirs = check(case)
    assert ours.error is not None and theirs.error is not None
