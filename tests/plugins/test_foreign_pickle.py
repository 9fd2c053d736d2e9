"""Files that pickle Lightning's own classes load by opt-in, with Lightning installed or not."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from milepost.errors import CheckpointFormatError, UnsafeCheckpointError
from milepost.plugins import TorchCheckpointIO

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pl = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.utilities.parsing import AttributeDict

WITHOUT = """
import json, sys, warnings
for name in ("pytorch_lightning", "lightning", "lightning_fabric"):
    sys.modules[name] = None  # an import of it fails, as where it is not installed
from milepost.plugins import TorchCheckpointIO
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loaded = TorchCheckpointIO().load_checkpoint(sys.argv[1], weights_only=False)
print(type(loaded["hyper_parameters"]).__name__, json.dumps(loaded["hyper_parameters"]))
print(type(loaded["state"]).__name__, loaded["state"].args)
print(*[str(w.message) for w in caught])
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an old Lightning wrote: its AttributeDict, and an object of a class that is gone by now."""
    gone = type("_Gone", (), {"__reduce__": lambda self: (type(self), (3,)), "__init__": lambda self, *a: None})
    gone.__module__, gone.__qualname__ = "pytorch_lightning.utilities.enums", "_Gone"
    monkeypatch.setattr(pl.utilities.enums, "_Gone", gone, raising=False)
    torch.save({"hyper_parameters": AttributeDict(lr=0.5), "state": gone()}, tmp_path / "old.ckpt")
    monkeypatch.delattr(pl.utilities.enums, "_Gone")
    return tmp_path / "old.ckpt"


def test_without_the_opt_in_it_is_refused_by_key_path(file: Path) -> None:
    with pytest.raises(UnsafeCheckpointError, match=r"hyper_parameters.*AttributeDict"):
        TorchCheckpointIO().load_checkpoint(file)


def test_with_lightning_its_classes_are_found_and_the_one_that_is_gone_is_named(file: Path) -> None:
    with pytest.warns(UserWarning, match=r"pytorch_lightning\.utilities\.enums\._Gone, which is not installed"):
        loaded = TorchCheckpointIO().load_checkpoint(file, weights_only=False)
    assert type(loaded["hyper_parameters"]) is AttributeDict
    assert loaded["hyper_parameters"].lr == 0.5
    assert loaded["state"].args == (3,)


def test_without_lightning_it_loads_all_the_same(file: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(file)], capture_output=True, text=True, check=True)
    first, second, third = done.stdout.strip().splitlines()
    assert first == 'dict {"lr": 0.5}'
    assert second == "_Gone (3,)"
    assert third.count("not installed") == 1


def test_the_other_package_of_lightnings_name_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning_fabric

    path = tmp_path / "unified.ckpt"
    kind = lightning_fabric.utilities.data.AttributeDict
    monkeypatch.setattr(kind, "__module__", "lightning.fabric.utilities.data")
    for name in ("lightning", "lightning.fabric", "lightning.fabric.utilities"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setitem(sys.modules, "lightning.fabric.utilities.data", lightning_fabric.utilities.data)
    torch.save({"hyper_parameters": kind(lr=0.5)}, path)
    monkeypatch.undo()
    assert type(TorchCheckpointIO().load_checkpoint(path, weights_only=False)["hyper_parameters"]) is kind


def test_a_class_of_another_package_that_is_missing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    module = type(sys)("elsewhere")
    module.Kind = type("Kind", (), {"__module__": "elsewhere"})
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    torch.save({"x": module.Kind()}, tmp_path / "x.ckpt")
    monkeypatch.undo()
    with pytest.raises(CheckpointFormatError, match="elsewhere"):
        TorchCheckpointIO().load_checkpoint(tmp_path / "x.ckpt", weights_only=False)
