"""`save_hyperparameters` and `load_from_checkpoint`, beside Lightning's on the same classes."""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hparams_cases import cases

import milepost
from milepost.errors import CheckpointNotFoundError, MisconfigurationException, ResumeError
from milepost.trainer.hparams import AttributeDict

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pl = pytest.importorskip("pytorch_lightning")

OURS, THEIRS = cases(milepost), cases(pl)
# Where Lightning keeps none, the arguments of the module around this one too, or raises a KeyError without a word.
BETTER: dict[str, Any] = {
    "mixin": {"a": 1},
    "child_in_parent": {"c": 8},
    "frame_named_arg": {"frame": 1, "a": 2},
}
REFUSED = ("unknown_name", "one_dataclass", "primitive", "a_list")


def kept(made: Any) -> tuple[dict[str, Any], dict[str, Any], Any, bool]:
    def plain(hparams: Any) -> dict[str, Any]:
        return {k: type(v) if isinstance(v, torch.nn.Module) else v for k, v in hparams.items()}

    name = getattr(made, "_hparams_name", None) if made.hparams else None
    return plain(made.hparams), plain(made.hparams_initial), name, made._log_hyperparams


@pytest.mark.filterwarnings("ignore:.*nn.Module", "ignore:.*is a torch module")
@pytest.mark.parametrize("name", sorted(OURS.keys() - BETTER.keys() - set(REFUSED) - {"setter"}))
def test_the_same_are_kept_as_in_lightning(name: str) -> None:
    assert kept(OURS[name]()) == kept(THEIRS[name]())


@pytest.mark.parametrize("name", BETTER)
def test_only_its_own_arguments_are_kept(name: str) -> None:
    assert kept(OURS[name]())[0] == BETTER[name] != kept(THEIRS[name]())[0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_refused_as_in_lightning(name: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        THEIRS[name]()
    with pytest.raises(MisconfigurationException, match="save_hyperparameters"):
        OURS[name]()


def test_hparams_cannot_be_assigned() -> None:
    for side in (OURS, THEIRS):
        with pytest.raises(AttributeError):
            side["setter"]()


def test_initial_values_are_a_copy() -> None:
    module = OURS["mutated"]()
    module.hparams_initial["items_"].append(7)
    assert module.hparams_initial == {"a": 1, "items_": []}


def test_an_attribute_dict_is_read_written_deleted_and_shown_as_lightnings() -> None:
    from pytorch_lightning.utilities.parsing import AttributeDict as Reference

    for kind in (AttributeDict, Reference):
        hparams = kind(rate=0.5, a=[1], long_name="x")
        hparams.rate = 0.1
        del hparams.a
        assert hparams == {"rate": 0.1, "long_name": "x"}
        assert hparams.rate == hparams["rate"] == 0.1
        assert not hasattr(hparams, "a")
        with pytest.raises((AttributeError, KeyError)):
            del hparams.a
    assert repr(AttributeDict(rate=0.1, long_name="x")) == repr(Reference(rate=0.1, long_name="x"))


def test_a_module_among_them_is_named_and_left_out_of_checkpoints(tmp_path: Path) -> None:
    class Whole(milepost.LightningModule):
        def __init__(self, net: torch.nn.Module, width: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.net(batch).sum()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.warns(UserWarning, match=r"'net' is a torch module.*ignore=\['net'\]"):
        trained = Whole(torch.nn.Linear(1, 1), width=4)
    assert trained.hparams.net is trained.net
    trainer = milepost.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[milepost.callbacks.ModelCheckpoint(tmp_path, save_last=True)],
    )  # fmt: skip
    trainer.fit(trained, torch.utils.data.DataLoader(torch.ones(4, 1)))
    with pytest.raises(TypeError, match=r"Whole needs \['net'\]"):
        Whole.load_from_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="is a torch module"):
        loaded = Whole.load_from_checkpoint(tmp_path / "last.ckpt", net=torch.nn.Linear(1, 1))
    assert loaded.hparams.width == 4
    assert torch.equal(loaded.net.weight, trained.net.weight)


# ---- load_from_checkpoint ----------------------------------------------------------------------------------------


def checkpoint(name: str | None = "kwargs", state: dict[str, Any] | None = None, **hparams: Any) -> dict[str, Any]:
    weights = {"net.weight": torch.ones(1, 1), "net.bias": torch.zeros(1)} if state is None else state
    return {
        "pytorch-lightning_version": "2.6.6", "state_dict": weights, "hparams_name": name, "hyper_parameters": hparams,
        "datamodule_hparams_name": name, "datamodule_hyper_parameters": hparams, "epoch": 0, "global_step": 0,
    }  # fmt: skip


def plain(side: Any) -> Any:
    class Plain(side.LightningModule):  # type: ignore[misc]
        def __init__(self, a: int, b: int = 2) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = torch.nn.Linear(1, 1)

    return Plain


def open_to_all(side: Any) -> Any:
    class Open(plain(side)):  # type: ignore[misc]
        def __init__(self, a: int = 0, **more: Any) -> None:
            super().__init__(a)
            self.save_hyperparameters()

    return Open


def configured(side: Any) -> Any:
    class Configured(side.LightningModule):  # type: ignore[misc]
        def __init__(self, conf: Any, other: int = 0) -> None:
            super().__init__()
            self.save_hyperparameters(conf)
            self.net = torch.nn.Linear(1, 1)

    return Configured


def late(side: Any) -> Any:
    class Late(side.LightningModule):  # type: ignore[misc]
        def __init__(self, a: int = 0) -> None:
            super().__init__()
            self.save_hyperparameters()

        def configure_model(self) -> None:
            self.net = torch.nn.Linear(1, 1)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            assert self.net is not None
            checkpoint["state_dict"]["net.bias"] += 5

    return Late


def lenient(side: Any) -> Any:
    class Lenient(plain(side)):  # type: ignore[misc]
        def __init__(self, a: int = 1) -> None:
            super().__init__(a)
            self.strict_loading = False

    return Lenient


WEIGHT = {"net.weight": torch.ones(1, 1)}
LOADS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "saved": (plain, checkpoint(a=3, b=4), {}),
    "overridden": (plain, checkpoint(a=3, b=4), {"b": 5}),
    "unknown ones dropped": (plain, checkpoint(a=3, zz=4), {}),
    "unknown ones passed": (open_to_all, checkpoint(a=3, zz=4), {"yy": 1}),
    "unknown keyword dropped": (plain, checkpoint(a=3), {"yy": 1}),
    "none saved": (plain, {"state_dict": checkpoint()["state_dict"], "pytorch-lightning_version": "2.6.6"}, {"a": 1}),
    "one missing": (plain, checkpoint(b=4), {}),
    "in one argument": (configured, checkpoint("conf", x=1, y=2), {}),
    "in one argument, overridden": (configured, checkpoint("conf", x=1, y=2), {"y": 3, "other": 4}),
    "in an argument that is gone": (plain, checkpoint("old", a=1), {}),
    "configure_model and on_load_checkpoint": (late, checkpoint(a=1), {}),
    "keys missing": (plain, checkpoint(a=1, state=WEIGHT), {}),
    "keys missing, not strict": (plain, checkpoint(a=1, state=WEIGHT), {"strict": False}),
    "keys left over, not strict": (plain, checkpoint(a=1, state={**WEIGHT, "q": torch.ones(1)}), {"strict": False}),
    "keys missing, lenient": (lenient, checkpoint(a=1, state=WEIGHT), {}),
    "keys missing, lenient and not strict": (lenient, checkpoint(a=1, state=WEIGHT), {"strict": False}),
    "strict contradicts": (lenient, checkpoint(a=1), {"strict": True}),
    "elsewhere": (plain, checkpoint(a=1), {"map_location": "meta"}),
}  # fmt: skip


def outcome(side: Any, build: Any, raw: dict[str, Any], options: dict[str, Any]) -> Any:
    """What was loaded, or the builtin that the error is, and whether it warned."""
    stream = io.BytesIO()
    torch.save(raw, stream)
    stream.seek(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(1)
        try:
            loaded = build(side).load_from_checkpoint(stream, **options)
        except (TypeError, ValueError, RuntimeError) as error:
            return next(kind for kind in (TypeError, ValueError, RuntimeError) if isinstance(error, kind))
    weights = {
        k: v.tolist() if v.device.type == "cpu" and k in raw["state_dict"] else None
        for k, v in loaded.state_dict().items()
    }
    relevant = [w for w in caught if "key" in str(w.message) or "strict" in str(w.message)]
    return dict(loaded.hparams), weights, loaded.device, bool(relevant)


@pytest.mark.parametrize("name", LOADS)
def test_it_loads_as_in_lightning(name: str) -> None:
    build, raw, options = LOADS[name]
    ours = outcome(milepost, build, raw, options)
    assert ours == outcome(pl, build, raw, options)
    if name in ("one missing", "keys missing", "strict contradicts"):
        assert isinstance(ours, type)


def write(raw: dict[str, Any], path: Path) -> Path:
    torch.save(raw, path)
    return path


@pytest.mark.filterwarnings("ignore:.*treespec")
@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("hparams.yaml", "a: 7\nb: [1, x]\n"),
        ("hparams.yml", '{"a": 7, "b": [1, "x"]}'),
        ("tags.csv", "key,value\na,7\nb,\"[1, 'x']\"\n"),
    ],
)
def test_hyper_parameters_come_from_a_loggers_file(file: str, text: str, tmp_path: Path) -> None:
    path = write(checkpoint(a=1), tmp_path / "x.ckpt")
    (tmp_path / file).write_text(text)
    for side in (milepost, pl):
        loaded = plain(side).load_from_checkpoint(path, hparams_file=str(tmp_path / file))
        assert loaded.hparams == {"a": 7, "b": [1, "x"]}


def test_hyper_parameters_that_our_logger_wrote_are_read(tmp_path: Path) -> None:
    path = write(checkpoint(), tmp_path / "x.ckpt")
    logger = milepost.loggers.CSVLogger(tmp_path)
    logger.log_hyperparams({"a": 7, "b": 1})
    logger.save()
    (written,) = tmp_path.rglob("hparams.yaml")
    assert plain(milepost).load_from_checkpoint(path, hparams_file=written).hparams == {"a": 7, "b": 1}


@pytest.mark.parametrize(
    ("file", "text", "error", "match"),
    [
        ("h.txt", "a: 1", MisconfigurationException, "must be a .yaml"),
        ("h.yaml", None, CheckpointNotFoundError, "nothing is there"),
        ("h.yaml", "[1]", MisconfigurationException, "holds list, not a mapping"),
        ("h.yaml", "a: !!python/object/apply:os.system [ls]", MisconfigurationException, "no YAML of plain values"),
    ],
)
def test_another_file_of_hyper_parameters_is_refused(
    file: str, text: str | None, error: type[Exception], match: str, tmp_path: Path
) -> None:
    path = write(checkpoint(a=1), tmp_path / "x.ckpt")
    if text is not None:
        (tmp_path / file).write_text(text)
    with pytest.raises(error, match=match):
        plain(milepost).load_from_checkpoint(path, hparams_file=tmp_path / file)


def test_it_is_called_on_the_class(tmp_path: Path) -> None:
    path = write(checkpoint(a=1), tmp_path / "x.ckpt")
    for side in (milepost, pl):
        with pytest.raises(TypeError, match="on an instance"):
            plain(side)(1).load_from_checkpoint(path)
        with pytest.raises(TypeError, match="on an instance"):
            side.LightningDataModule().load_from_checkpoint(path)


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    path = write(checkpoint(a=1), tmp_path / "x.ckpt")

    class Drawing(late(milepost)):  # type: ignore[misc]
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            torch.rand(1), np.random.rand(1), random.random()

    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]

    before = states()
    Drawing.load_from_checkpoint(path)
    assert states() == before


def test_no_function_that_a_file_names_is_run(tmp_path: Path) -> None:
    named = {"_instantiator": "os.system", "_class_path": "os.path"}
    path = write(checkpoint(a=1, **named), tmp_path / "x.ckpt")
    assert plain(milepost).load_from_checkpoint(path).hparams == {"a": 1, "b": 2}
    path = write(checkpoint(a={"class_path": "os.system", "init_args": {}}, **named), tmp_path / "y.ckpt")
    with pytest.warns(UserWarning, match=r"'os\.system'.*not run"):
        loaded = open_to_all(milepost).load_from_checkpoint(path)
    assert loaded.hparams == {"a": {"class_path": "os.system", "init_args": {}}, "b": 2}


def test_a_mismatch_names_the_remedy(tmp_path: Path) -> None:
    path = write(checkpoint(a=1, state=WEIGHT), tmp_path / "x.ckpt")
    with pytest.raises(ResumeError, match="strict=False"):
        plain(milepost).load_from_checkpoint(path)


def test_a_config_of_omegaconf_stays_whole_with_what_refers_to_its_root(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"rate": 0.1, "net": {"rate": "${rate}"}})
    ours, theirs = configured(milepost)(config), configured(pl)(config)
    assert type(ours.hparams) is type(theirs.hparams) is omegaconf.DictConfig
    assert ours.hparams_initial == config and ours.hparams_initial is not config
    trainer = milepost.Trainer(accelerator="cpu", logger=False)
    trainer.strategy.connect(ours)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = configured(milepost).load_from_checkpoint(tmp_path / "x.ckpt", rate=0.5)
    assert type(loaded.hparams) is omegaconf.DictConfig
    assert loaded.hparams.net.rate == 0.5
    assert configured(pl).load_from_checkpoint(tmp_path / "x.ckpt").hparams["rate"] == 0.1


# ---- data modules ------------------------------------------------------------------------------------------------


def data(side: Any) -> Any:
    class Data(side.LightningDataModule):  # type: ignore[misc]
        def __init__(self, a: int, b: int = 2) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.state: dict[str, Any] = {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.state = state_dict

    return Data


def test_a_data_module_loads_as_in_lightning(tmp_path: Path) -> None:
    for side in (milepost, pl):
        key = data(side).__qualname__
        path = write({**checkpoint(a=1, zz=2), key: {"seen": 3}}, tmp_path / "x.ckpt")
        loaded = data(side).load_from_checkpoint(path, b=4)
        assert (loaded.hparams, loaded.state) == ({"a": 1, "b": 4}, {"seen": 3})
        (tmp_path / "h.yaml").write_text("a: 9")
        assert data(side).load_from_checkpoint(path, hparams_file=str(tmp_path / "h.yaml")).hparams["a"] == 9
