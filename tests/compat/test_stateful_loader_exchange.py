"""A stateful loader's position goes from Lightning to us and back, where Lightning keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

import milepost

pl = pytest.importorskip("pytorch_lightning")
pytestmark = [
    pytest.mark.filterwarnings(text)
    for text in (
        "ignore:'set_vital' is deprecated", "ignore:.*does not have many workers", "ignore:GPU available but not used",
        "ignore:.*isinstance.treespec, LeafSpec", "ignore:.*pkg_resources", "ignore:Checkpoint directory .* exists",
        "ignore:.*is smaller than the logging interval", "ignore:The dirpath has changed from",
        "ignore:You're resuming from a checkpoint that ended before",
    )
]  # fmt: skip


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), 1.0])


def fit(side: Any, place: Path, resume: Path | None = None) -> list[list[int]]:
    """The sample ids that training sees; a file ``step=10.ckpt`` is left four batches inside the second epoch."""

    class Line(side.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(2, 1)
            self.seen: list[list[int]] = []

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            self.seen.append(batch[:, 0].int().tolist())
            return self.net(batch / 21).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    torch.manual_seed(4 if resume is None else 40)
    keep = side.callbacks.ModelCheckpoint(dirpath=place, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    trainer = side.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, callbacks=[keep], enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=place,
    )  # fmt: skip
    model = Line()
    loader = StatefulDataLoader(Rows(), batch_size=3, shuffle=True)
    trainer.fit(model, loader, ckpt_path=None if resume is None else str(resume))
    return model.seen


@pytest.mark.parametrize(("writer", "reader"), [(pl, milepost), (milepost, pl)], ids=["pl", "milepost"])
def test_the_epoch_goes_on_without_repeats(writer: Any, reader: Any, tmp_path: Path) -> None:
    whole = fit(writer, tmp_path / "run")
    path = tmp_path / "run/step=10.ckpt"
    saved = torch.load(path, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert [state["_num_yielded"] for state in saved] == [3]
    if reader is milepost:
        with pytest.warns(UserWarning, match="it holds no random state, so"):
            rest = fit(reader, tmp_path / "again", path)
    else:
        rest = fit(reader, tmp_path / "again", path)
    assert rest == whole[10:]
    assert sorted(i for batch in whole[7:10] + rest for i in batch) == list(range(21))


def test_both_write_the_same_state(tmp_path: Path) -> None:
    states = []
    for side in (pl, milepost):
        fit(side, tmp_path / side.__name__)
        saved = torch.load(tmp_path / side.__name__ / "step=10.ckpt", weights_only=True)
        states.append(saved["loops"]["fit_loop"]["state_dict"]["combined_loader"][0])
    theirs, ours = states
    assert set(theirs) == set(ours)
    sampler, other = (state.pop("_sampler_iter_state") for state in (theirs, ours))
    assert theirs == ours
    assert set(sampler) == set(other)
    assert sampler["samples_yielded"] == other["samples_yielded"] == 9


def test_other_loaders_are_refused(tmp_path: Path) -> None:
    fit(pl, tmp_path / "run")
    path = tmp_path / "run/step=10.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] *= 2
    torch.save(checkpoint, path)
    with (
        pytest.raises(milepost.errors.ResumeError, match="states of 2 loaders"),
        pytest.warns(UserWarning, match="no random state"),
    ):
        fit(milepost, tmp_path / "again", path)
