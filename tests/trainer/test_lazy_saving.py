"""Lazy staging under the Trainer: late where that is right, at once where it cannot be known, never of two moments.

`MILEPOST_CHECK_LAZY=1` holds throughout: each late copy is compared with one made at once. In the cases the copying
thread is held up until the next `training_step`, so that the copy is late for certain.
"""

from __future__ import annotations

import copy
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from milepost import LightningModule, Trainer
from milepost.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from milepost.engine.batch import Staging
from milepost.engine.lazy import StepGate, changed_by_steps
from milepost.errors import CheckpointSaveError
from milepost.plugins import AsyncCheckpointIO, SnapshotCheckpointIO
from milepost.strategies import SingleDeviceStrategy
from milepost.trainer.late_copies import DIRECT


@pytest.fixture(autouse=True)
def compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILEPOST_CHECK_LAZY", "1")


class Net(LightningModule):
    """With BatchNorm, whose buffers change in forward. Notes which saves were still being copied in training_step."""

    def __init__(self, optimizer: Any = torch.optim.AdamW) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))
        self.make = optimizer
        self.held: Held | None = None

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())

    def loss(self, batch: Any) -> torch.Tensor:
        return self.layers(batch[0]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)  # changes the buffers of BatchNorm, which were copied at once
        if self.held is not None:
            self.held.look()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch))


class Manual(Net):
    def __init__(self, optimizer: Any = torch.optim.AdamW) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Held(Callback):
    """Holds up the copying of each save but the last, and keeps what it must hold."""

    def __init__(self, io: SnapshotCheckpointIO) -> None:
        self.io = io
        self.go = threading.Event()
        self.expected: dict[int, Any] = {}
        self.late = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        now = copy.deepcopy(
            {"state_dict": pl_module.state_dict(), "optimizer": [o.state_dict() for o in trainer.optimizers]}
        )
        self.expected.setdefault(trainer.global_step, now)  # while batches accumulate, the first is saved
        self.go = threading.Event()
        self.io.wait()  # what is still being written needs the thread that is held up
        if not trainer.is_last_batch:
            self.io._engine._started().pool.submit(self.go.wait)

    def look(self) -> None:
        saves = self.io._engine._under_way
        self.late += bool(saves) and saves[-1].staging is not None and not saves[-1].staging.done()
        self.go.set()


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return set(found) == set(expected) and all(same(found[k], expected[k]) for k in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


def fit(folder: Path, net: Net, io: Any, *callbacks: Callback, **options: Any) -> Trainer:
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False, plugins=io,
        default_root_dir=folder, num_sanity_val_steps=0,
        callbacks=[*callbacks, ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)], **options,
    )  # fmt: skip
    data = DataLoader(TensorDataset(torch.randn(24, 8)), batch_size=4)
    trainer.fit(net, data, data if options.get("val_check_interval") else None)
    return trainer


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "for-loop": (lambda: Net(lambda p: torch.optim.AdamW(p, foreach=False)), {}),
    "foreach": (lambda: Net(lambda p: torch.optim.AdamW(p, foreach=True)), {}),
    "fused": (lambda: Net(lambda p: torch.optim.AdamW(p, fused=True)), {}),
    "LBFGS": (lambda: Net(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2)), {}),
    "GradScaler": (lambda: Net(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)), {"precision": "16-mixed"}),
    "clipping": (Net, {"gradient_clip_val": 0.1}),
    "accumulation": (Net, {"accumulate_grad_batches": 2}),
    "manual": (Manual, {}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_copy_is_late_and_of_the_moment_of_the_save(tmp_path: Path, case: str) -> None:
    make, options = CASES[case]
    io = SnapshotCheckpointIO(lazy=True, threads=1)
    held, net = Held(io), make()
    net.held = held
    trainer = fit(tmp_path, net, io, held, **options)
    saves = len(list(tmp_path.glob("step=*")))
    assert saves == trainer.global_step and held.late == saves - 1, "the last is followed by no step"
    for step in range(1, saves + 1):
        expected = held.expected[step]
        found = io.load_checkpoint(tmp_path / f"step={step}.ckpt")
        assert same(found["state_dict"], expected["state_dict"]), step
        assert same(found["optimizer_states"], expected["optimizer"]), step


# ---- at once, where it cannot be known ------------------------------------------------------------------------------


class Saves(Callback):
    """Saves by hand in a hook, and writes to weights in the same one."""

    def __init__(self) -> None:
        self.saved: list[Any] = []
        self.expected: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.expected.append(pl_module.layers[0].weight.detach().clone())
        self.saved.append(trainer.save_checkpoint(f"{trainer.default_root_dir}/own-{trainer.global_step}"))
        pl_module.layers[0].weight.data.mul_(0.5)


def test_a_save_of_the_users_own_hook_is_copied_at_once(tmp_path: Path) -> None:
    io, saves = SnapshotCheckpointIO(lazy=True), Saves()
    fit(tmp_path, Net(), io, saves)
    for step, (save, expected) in enumerate(zip(saves.saved, saves.expected, strict=True), start=1):
        assert save.staging is None
        assert torch.equal(io.load_checkpoint(tmp_path / f"own-{step}")["state_dict"]["layers.0.weight"], expected)


class Clamps(Callback):
    """Writes to weights through `.data`, which nothing but a comparison of bytes would find."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for parameter in pl_module.parameters():
            parameter.data.clamp_(-0.1, 0.1)


def test_the_copy_is_finished_before_a_hook_of_the_user(tmp_path: Path) -> None:
    io = SnapshotCheckpointIO(lazy=True)
    fit(tmp_path, Net(), io, Clamps())  # a torn copy would fail its save
    assert len(io.list(tmp_path)) == 6


@pytest.mark.parametrize(
    "average", [lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1)]
)
def test_averages_are_put_in_and_out_of_the_weights_between_saves(tmp_path: Path, average: Any) -> None:
    io = SnapshotCheckpointIO(lazy=True)
    fit(tmp_path, Net(), io, average(), val_check_interval=2)
    assert len(io.list(tmp_path)) == 6


class Overrides(Net):
    """Brings each hook that the loop calls between a save and the step, beside training_step and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}]

    def note(self, hook: str) -> None:
        assert not self.trainer.late_copies.pending
        self.called.add(hook)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.note("on_train_batch_start")

    def optimizer_step(self, *args: Any) -> None:
        self.note("optimizer_step")
        super().optimizer_step(*args)

    def optimizer_zero_grad(self, *args: Any) -> None:
        self.note("optimizer_zero_grad")
        super().optimizer_zero_grad(*args)

    def configure_gradient_clipping(self, *args: Any) -> None:
        self.note("configure_gradient_clipping")

    def lr_scheduler_step(self, *args: Any) -> None:
        self.note("lr_scheduler_step")
        super().lr_scheduler_step(*args)


HOOKS = {*DIRECT, "on_train_batch_start"}


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_before_each_overridden_hook_the_copy_is_finished(tmp_path: Path, hook: str) -> None:
    only = type("Only", (Overrides,), {name: getattr(LightningModule, name) for name in HOOKS - {hook}})
    net = only()
    fit(tmp_path, net, SnapshotCheckpointIO(lazy=True))
    assert net.called == {hook}


def test_behind_async_checkpoint_io_any_plugin_is_lazy(tmp_path: Path) -> None:
    io = AsyncCheckpointIO(lazy=True)
    held: list[bool] = []

    class Looks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            held.append(self.trainer.late_copies.pending)
            return super().training_step(batch, batch_idx)

    net = Looks()
    fit(tmp_path, net, io)
    assert held == [False, True, True, True, True, True]
    found = io.load_checkpoint(tmp_path / "step=6.ckpt")
    assert same(found["state_dict"], dict(net.state_dict()))


def test_what_was_vouched_for_in_one_save_is_not_in_a_later_one_of_the_strategys(tmp_path: Path) -> None:
    class Strategy(SingleDeviceStrategy):
        def save_checkpoint(self, *args: Any) -> Any:
            vouched.append(len(self.stepping_optimizers))
            return super().save_checkpoint(*args)

    class Looks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            assert self.trainer.strategy.stepping_optimizers == ()
            return super().training_step(batch, batch_idx)

    vouched: list[int] = []
    fit(tmp_path, Looks(), SnapshotCheckpointIO(lazy=True), strategy=Strategy())
    assert vouched and 1 in vouched


def optimizers_that_are_refused() -> dict[str, Any]:
    class Own(torch.optim.SGD):
        """Another's: it may write to parameters in methods of any name."""

    def compiled(parameters: Any) -> Any:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
        return optimizer

    def in_backward(parameters: Any) -> Any:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.register_post_accumulate_grad_hook(lambda p: None)
        return optimizer

    return {
        "own class": lambda p: Own(p, lr=0.1),
        "compiled step": compiled,
        "in backward": in_backward,
        "CUDA graphs": lambda p: torch.optim.AdamW(p, capturable=True, foreach=False),
    }


@pytest.mark.parametrize("name", list(optimizers_that_are_refused()))
def test_what_cannot_be_vouched_for_is_copied_at_once(name: str) -> None:
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=False)]
    assert set(changed_by_steps([torch.optim.SGD(parameters)])) == {parameters[0].data_ptr()}
    assert not changed_by_steps([optimizers_that_are_refused()[name](parameters[:1])])


def test_a_scheduler_on_the_optimizer_does_not_matter() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert changed_by_steps([optimizer])


# ---- who else writes to weights ------------------------------------------------------------------------------------


class Writes(Net):
    """Writes to a weight in training_step, before the step, where the Trainer cannot know of it."""

    def __init__(self, told: bool) -> None:
        super().__init__()
        self.told = told

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.held is not None and batch_idx:
            if self.told:
                self.held.go.set()
                self.trainer.finish_staging()
            self.layers[2].weight.data.clamp_(-0.01, 0.01)
        return super().training_step(batch, batch_idx)


def test_a_training_step_that_writes_is_found_out_unless_it_has_waited(tmp_path: Path) -> None:
    io = SnapshotCheckpointIO(lazy=True, threads=1)
    net = Writes(told=False)
    net.held = Held(io)
    with pytest.raises(CheckpointSaveError, match=r"'state_dict\.layers\.2\.weight' was written to"):
        fit(tmp_path / "not", net, io, net.held)
    net = Writes(told=True)
    net.held = Held(io)
    fit(tmp_path / "told", net, io, net.held)
    assert len(io.list(tmp_path / "told")) == 6


class Loads(Net):
    """Takes other weights between the save and the step."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx:
            threading.Timer(0, self.held.go.set).start()  # type: ignore[union-attr]
            self.load_state_dict({name: tensor + 1 for name, tensor in self.state_dict().items()})
        return super().training_step(batch, batch_idx)


def test_loading_weights_into_the_module_waits_for_the_copy(tmp_path: Path) -> None:
    io = SnapshotCheckpointIO(lazy=True, threads=1)
    net = Loads()
    net.held = Held(io)
    fit(tmp_path, net, io, net.held)
    for step in range(1, 7):
        found = io.load_checkpoint(tmp_path / f"step={step}.ckpt")["state_dict"]
        assert same(found, net.held.expected[step]["state_dict"])


class Fails(Net):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 3:
            raise self.error
        return loss


class WritesOnException(Callback):
    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        for parameter in pl_module.parameters():
            parameter.data.zero_()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_or_interrupt_first_finishes_the_copy(tmp_path: Path, error: type[BaseException]) -> None:
    io = SnapshotCheckpointIO(lazy=True, threads=1)
    net = Fails(error)
    net.held = Held(io)
    with pytest.raises(error):
        fit(tmp_path, net, io, net.held, WritesOnException())
    assert len(io.list(tmp_path)) == 3
    found = io.load_checkpoint(tmp_path / "step=3.ckpt")["state_dict"]
    assert same(found, net.held.expected[3]["state_dict"])


def test_a_run_that_loads_another_checkpoint_comes_after_the_copy(tmp_path: Path) -> None:
    io = SnapshotCheckpointIO(lazy=True)
    net = Net()
    trainer = fit(tmp_path, net, io)
    last = copy.deepcopy(net.state_dict())
    data = DataLoader(TensorDataset(torch.randn(4, 8)))
    net.test_step = net.validation_step  # type: ignore[method-assign]
    trainer.save_checkpoint(tmp_path / "by hand")
    trainer.test(net, data, ckpt_path=str(tmp_path / "step=1.ckpt"))
    assert not same(net.state_dict(), last)
    assert same(io.load_checkpoint(tmp_path / "by hand")["state_dict"], last)
    assert same(io.load_checkpoint(tmp_path / "step=6.ckpt")["state_dict"], last)


@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_steps_out_of_compiled_code_wait_too() -> None:
    """The hook of a step that torch.compile has traced before there was anything to wait for."""
    torch._dynamo.reset()
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gate, copied = StepGate(), Future[None]()

    @torch.compile(backend="eager")
    def train(batch: torch.Tensor) -> None:
        loss = model(batch).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    batch = torch.randn(4, 8)
    train(batch)
    gate.hold_until(Staging(copied))
    before = model.weight.detach().clone()
    stepping = threading.Thread(target=train, args=(batch,))
    stepping.start()
    stepping.join(1)  # not a proof by time: whatever it does until then, it cannot have stepped
    assert torch.equal(model.weight, before)
    copied.set_result(None)
    stepping.join()
    assert not torch.equal(model.weight, before)
    gate.release()
    torch._dynamo.reset()
