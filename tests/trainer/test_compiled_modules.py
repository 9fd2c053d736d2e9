"""torch.compile'd modules: train as with pytorch-lightning, and leave no `_orig_mod.` in what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from beside import Record, loader, plain, run

import milepost
from milepost.trainer.state import without_compile_prefix

pytestmark = pytest.mark.filterwarnings(  # of torch's own compiler
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute:UserWarning"
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    yield
    torch._dynamo.reset()


graphs: list[Any] = []


def counting(graph: Any, inputs: Any) -> Any:
    """A backend that runs what it is given as it stands."""
    graphs.append(graph)
    return graph.forward


def small(library: Any) -> Any:
    class Net(library.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = (self.layer(batch[0]) - batch[1]).square().mean()
            if library is milepost:  # pytorch-lightning 2.6.6 cannot log in a compiled step of torch 2.13
                self.log("train_loss", loss, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Net


def whole(library: Any) -> tuple[Any, Any]:
    """The module, and what is given to the Trainer: the compiled module."""
    net = small(library)()
    return net, torch.compile(net, backend=counting)


def part(library: Any) -> tuple[Any, Any]:
    """A module whose submodule is compiled in its ``__init__``."""

    class Net(small(library)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.compile(self.layer, backend=counting)

    net = Net()
    return net, net


def eager(library: Any) -> tuple[Any, Any]:
    net = small(library)()
    return net, net


def trainer_of(library: Any, epochs: int = 2) -> Any:
    return library.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


def weights_of(net: Any) -> Any:
    return plain(without_compile_prefix(net.state_dict()))


@pytest.mark.parametrize("make", [whole, part])
def test_trains_as_the_uncompiled_and_as_lightning(make: Any, tmp_path: Path) -> None:
    def case(library: Any, record: Record, make: Any = make) -> None:
        net, given = make(library)
        trainer = trainer_of(library)
        trainer.fit(given, loader())
        trainer.save_checkpoint(tmp_path / f"{library.__name__}.ckpt")
        record.left = {"weights": weights_of(net)}

    graphs.clear()
    ours = run(case, "milepost")
    assert ours.error is None, ours.left
    assert graphs, "nothing was compiled"
    theirs, plainly = run(case, "lightning"), run(lambda library, record: case(library, record, eager), "milepost")
    assert theirs.error is None, theirs.left
    assert ours.left == plainly.left == theirs.left
    saved = torch.load(tmp_path / "milepost.ckpt", weights_only=True)
    assert not any("_orig_mod" in key for key in saved["state_dict"])


def test_a_compiled_step_logs_and_a_second_run_compiles_nothing_again() -> None:
    net, given = whole(milepost)
    trainer = trainer_of(milepost, 1)
    trainer.fit(given, loader())
    first = float(trainer.callback_metrics["train_loss_epoch"])
    forward = net.forward
    trainer.fit_loop.max_epochs = 2
    trainer.fit(given, loader())
    assert net.forward is forward and float(trainer.callback_metrics["train_loss_epoch"]) < first


def test_by_hand() -> None:
    class Net(small(milepost)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def forward(self, x: torch.Tensor) -> Any:
            return self.layer(x)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward((self(batch[0]) - batch[1]).square().mean())
            optimizer.step()

    graphs.clear()
    trainer = trainer_of(milepost, 1)
    trainer.fit(torch.compile(Net(), backend=counting), loader())
    assert trainer.global_step == 6 and graphs


@pytest.mark.parametrize(("written", "into"), [(whole, eager), (part, eager), (eager, part), (whole, whole)])
def test_files_with_and_without_the_prefix_load(written: Any, into: Any, tmp_path: Path) -> None:
    """What other programs saved of compiled modules has the prefix; ours resume from it and load it."""

    def first(library: Any, record: Record) -> None:
        net, given = written(library)
        trainer = trainer_of(library, 1)
        trainer.fit(given, loader())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        file = torch.load(tmp_path / "a.ckpt", weights_only=True)
        file["state_dict"] = dict(given.state_dict())  # as torch itself names the weights
        torch.save(file, tmp_path / "a.ckpt")
        record.left = {"weights": weights_of(net)}

    def second(library: Any, record: Record) -> None:
        net, given = into(library)
        trainer_of(library, 1).fit(given, loader(), ckpt_path=tmp_path / "a.ckpt")
        record.left = {"weights": weights_of(net)}
        assert weights_of(type(net).load_from_checkpoint(tmp_path / "a.ckpt")) == record.left["weights"]

    before, after = run(first, "milepost"), run(second, "milepost")
    assert before.error is None and after.error is None, (before.left, after.left)
    prefixed = any("_orig_mod" in key for key in torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    assert prefixed == (written is not eager)
    assert before.left == after.left
