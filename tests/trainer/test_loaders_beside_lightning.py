"""Several, nested and combined loaders, and when they are asked for: as with pytorch-lightning."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside import Flow, Record, check, fit, loader, module_of
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from milepost.errors import MisconfigurationException
from milepost.utilities.combined_loader import CombinedLoader

Make = Callable[[Any], Any]  # from a library to loaders
MODES = ("min_size", "max_size", "max_size_cycle", "sequential")


def short() -> DataLoader[Any]:
    return loader(2)


def long() -> DataLoader[Any]:
    return loader(5, seed=3)


def flow() -> DataLoader[Any]:
    return DataLoader(Flow(), batch_size=4)


def empty() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.zeros(0, 3)))


def combined(library: Any, *args: Any) -> Any:
    return importlib.import_module(f"{library.__name__}.utilities.combined_loader").CombinedLoader(*args)


def seeing(net: Any) -> Any:
    class Net(net):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            parts = tree_leaves(batch)
            sums = [None if part is None else part.double().sum() for part in parts]
            self.note("train", batch_idx, sums, self.trainer.is_last_batch, self.trainer.num_training_batches)
            wide = [part for part in parts if part is not None and part.shape[-1] == 3]
            return self.layer(wide[0]).sum()

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            sums = [None if part is None else part.double().sum() for part in tree_leaves(batch)]
            self.note("val", batch_idx, dataloader_idx, sums)
            self.log("i", float(batch_idx))

    return Net


def both(train: Make, validation: Make, **options: Any) -> tuple[Record, Record]:
    def case(library: Any, record: Record) -> None:
        net = seeing(module_of(library, record))()
        fit(library, record, net, train(library), validation(library), num_sanity_val_steps=0, **options)

    return check(case)


TRAINING: dict[str, Make] = {
    "dict": lambda library: {"a": short(), "b": long()},
    "list": lambda library: [short(), long()],
    "tuple": lambda library: (short(), long()),
    "nested": lambda library: {"a": [short(), long()], "b": {"c": loader(3, seed=9)}},
    "unknown length": lambda library: [short(), flow()],
    "one empty": lambda library: [short(), empty()],
    "one combined": lambda library: combined(library, short(), "min_size"),
    "combined nested": lambda library: combined(library, [[short()], [long(), loader(3, seed=4)]], "max_size"),
    **{mode: lambda library, mode=mode: combined(library, {"a": short(), "b": long()}, mode) for mode in MODES[:3]},
    **{f"{mode} unknown": lambda library, mode=mode: combined(library, [short(), flow()], mode) for mode in MODES[:3]},
}


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 3}], ids=str)
@pytest.mark.parametrize("train", TRAINING.values(), ids=TRAINING.keys())
def test_training(train: Make, options: dict[str, Any]) -> None:
    ours, _ = both(train, lambda library: loader(3, seed=2), **options)
    assert ours.error is None


@pytest.mark.parametrize("name", [name for name in TRAINING if "unknown" not in name])
def test_training_on_a_fraction(name: str) -> None:
    ours, _ = both(TRAINING[name], lambda library: loader(3, seed=2), limit_train_batches=0.5)
    assert ours.error is None


def test_training_on_one_after_the_other_is_refused() -> None:
    ours, theirs = both(lambda library: combined(library, [short(), long()], "sequential"), lambda library: loader(3))
    assert ours.error is MisconfigurationException and theirs.error is not None


@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 3}], ids=str)
@pytest.mark.parametrize(
    "validation",
    [
        *(lambda library, mode=mode: combined(library, {"a": short(), "b": long()}, mode) for mode in MODES),
        lambda library: {"a": short(), "b": long()},
        lambda library: [flow(), short()],
        lambda library: [short(), [long(), loader(3, seed=4)]],
        lambda library: [empty(), short()],
        lambda library: [short(), empty()],
        lambda library: [],
    ],
)
def test_validation(validation: Make, options: dict[str, Any]) -> None:
    ours, _ = both(lambda library: loader(), validation, **options)
    assert ours.error is None


def test_a_step_must_take_the_number_of_its_loader() -> None:
    def case(library: Any, record: Record) -> None:
        fit(library, record, module_of(library, record)(), loader(), [short(), long()])

    ours, theirs = check(case)
    assert ours.error is MisconfigurationException and theirs.error is not None


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of the other library
@pytest.mark.parametrize("mode", MODES)
def test_a_combined_loader_by_itself(mode: str) -> None:
    from pytorch_lightning.utilities.combined_loader import CombinedLoader as Theirs

    loaders = {"a": DataLoader(range(6), batch_size=4), "b": DataLoader(range(15), batch_size=5)}
    ours, theirs = CombinedLoader(loaders, mode), Theirs(loaders, mode)
    for _ in range(2):
        for mine, expected in zip(ours, theirs, strict=True):
            assert mine[1:] == expected[1:]
            left, right = tree_leaves(mine[0]), tree_leaves(expected[0])
            assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(left, right, strict=True))
    assert len(ours) == len(theirs) and ours.flattened == theirs.flattened and ours.iterables == loaders


def test_a_combined_loader_moves_on_with_the_global_seed() -> None:
    shuffled = CombinedLoader([DataLoader(range(8), shuffle=True)], "min_size")

    def read() -> list[int]:
        return [int(batch[0]) for batch, _, _ in shuffled]

    torch.manual_seed(3)
    first, second = read(), read()
    torch.manual_seed(3)
    assert read() == first != second and sorted(first) == list(range(8))
    with pytest.raises(TypeError, match="does not know its length"):
        len(CombinedLoader([flow()], "max_size"))


# ---- who is asked for loaders, and when ------------------------------------------------------------------------------

ASKED: list[dict[str, Any]] = [
    {},
    {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 4},
    {"reload_dataloaders_every_n_epochs": 2, "max_epochs": 5},
    {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 4, "num_sanity_val_steps": 0},
    {"reload_dataloaders_every_n_epochs": 2, "max_epochs": 6, "check_val_every_n_epoch": 3},
    {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3, "val_check_interval": 2},
    {"limit_val_batches": 0},
    {"limit_train_batches": 4},
    {"limit_train_batches": 0},
    {"fast_dev_run": 1},
    {"num_sanity_val_steps": 0},
]


@pytest.mark.parametrize("options", ASKED, ids=str)
def test_the_module_is_asked_when_lightning_asks_it(options: dict[str, Any]) -> None:
    def case(library: Any, record: Record) -> None:
        class Net(module_of(library, record)):  # type: ignore[misc]
            def train_dataloader(self) -> Any:
                self.note("asked for training", self.trainer.current_epoch)
                return loader()

            def val_dataloader(self) -> Any:
                self.note("asked for validation", self.trainer.current_epoch, self.trainer.sanity_checking)
                return loader(3, seed=2)

            def configure_optimizers(self) -> Any:
                if options.get("limit_train_batches") == 4:
                    self.note("steps", self.trainer.estimated_stepping_batches)
                return super().configure_optimizers()

            def on_train_start(self) -> None:
                trainer = self.trainer
                self.note(type(trainer.train_dataloader).__name__, type(trainer.val_dataloaders).__name__)
                self.note(trainer.num_training_batches, trainer.num_val_batches)

        fit(library, record, Net(), **options)

    check(case)


@pytest.mark.parametrize("options", ASKED[::2], ids=str)
def test_the_data_module_is_asked_when_lightning_asks_it(options: dict[str, Any]) -> None:
    def case(library: Any, record: Record) -> None:
        class Data(library.LightningDataModule):  # type: ignore[misc]
            def train_dataloader(self) -> Any:
                record.events.append(("asked for training", self.trainer.current_epoch))
                return loader()

            def val_dataloader(self) -> Any:
                record.events.append(("asked for validation", self.trainer.current_epoch, self.trainer.sanity_checking))
                return loader(3, seed=2)

            def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                return [batch[0] * 2, batch[1]]

        fit(library, record, module_of(library, record)(), datamodule=Data(), **options)

    check(case)


@pytest.mark.parametrize("where", ["train", "validation"])
def test_overfitting_takes_shuffling_away(where: str) -> None:
    def make(part: str, seed: int) -> Make:
        return lambda library: DataLoader(loader(4, seed=seed).dataset, batch_size=4, shuffle=where == part)

    both(make("train", 1), make("validation", 2), overfit_batches=2, max_epochs=3)


def test_a_batch_that_is_none_is_passed_over() -> None:
    def gaps(library: Any) -> Any:
        return DataLoader([0, 1, 2, 3], collate_fn=lambda items: None if items[0] == 1 else next(iter(loader())))

    both(gaps, lambda library: loader(3, seed=2))


def test_a_step_that_asks_for_the_iterator_is_refused() -> None:
    import milepost

    class Net(module_of(milepost, Record())):  # type: ignore[misc]
        def training_step(self, dataloader_iter: Any) -> None: ...

    with pytest.raises(MisconfigurationException, match="steps take a batch here"):
        fit(milepost, Record(), Net(), loader(), logger=False)


def test_a_negative_reload_is_refused() -> None:
    def case(library: Any, record: Record) -> None:
        fit(library, record, module_of(library, record)(), loader(), reload_dataloaders_every_n_epochs=-1)

    ours, theirs = check(case)
    assert ours.error is MisconfigurationException and theirs.error is not None


@pytest.mark.parametrize("epochs", [3, 5])
def test_a_second_fit_goes_on_from_the_first(epochs: int) -> None:
    def case(library: Any, record: Record) -> None:
        net = module_of(library, record)()
        trainer = fit(library, record, net, loader(), loader(3, seed=2))
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(net, loader(seed=5), loader(3, seed=6))
        record.left |= {"second": [trainer.current_epoch, trainer.global_step, net.layer[0].weight.sum().item()]}

    check(case)
