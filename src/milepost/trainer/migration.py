"""Checkpoints of Lightning 1.6 to 2.5, brought to the present layout. Pure: each step edits the dict it is given.

What changed when (each step looks at the shape, not at the version, so that files of release candidates and nightly
builds are understood too, and a second pass changes nothing):

=====  ==============================================================================================================
1.6.5  ``epoch_loop.state_dict`` counts the batches that stepped an optimizer
1.9    ModelCheckpoint's key in ``callbacks`` no longer holds ``save_on_train_epoch_end``
2.0    apex and its ``amp_scaling_state`` are gone; ``batch_loop.optimizer_loop`` became ``automatic_optimization``,
       ``batch_loop.manual_loop`` became ``manual_optimization``; the loops over loaders of validate, test and predict
       were merged with the loops over batches
2.0    automatic optimization has one optimizer only: with several it is manual, and its steps are counted there
2.1    the state of 16-bit training stands under ``MixedPrecision``
=====  ==============================================================================================================
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from milepost.errors import ResumeError
from milepost.trainer.progress import Progress

CONTRACT_VERSION = "2.6.6"
"""Version of the checkpoint contract, stored where Lightning looks for its own."""

VERSION_KEY = "pytorch-lightning_version"
_Dict = dict[str, Any]

_MOVED = {
    "epoch_loop.batch_loop.optimizer_loop.": "epoch_loop.automatic_optimization.",
    "epoch_loop.batch_loop.manual_loop.": "epoch_loop.manual_optimization.",
    "epoch_loop.optimizer_loop.": "epoch_loop.automatic_optimization.",  # of the 2.0 release candidates
    "epoch_loop.manual_loop.": "epoch_loop.manual_optimization.",
    "epoch_loop.val_loop.epoch_loop.": "epoch_loop.val_loop.",
}
_SCALER_KEYS = ("MixedPrecisionPlugin", "NativeMixedPrecisionPlugin", "native_amp_scaling_state")
_AUTOMATIC = "epoch_loop.automatic_optimization.optim_progress"
_MANUAL = "epoch_loop.manual_optimization.optim_step_progress"


def migrate_checkpoint(checkpoint: _Dict) -> _Dict:
    """Bring a checkpoint of an older Lightning to the present layout, in place, and return it.

    Called once a file is read, before any hook sees it. A file of a newer Lightning is left as it is, with a warning.
    The version that wrote the file is kept under ``legacy_pytorch-lightning_version``.
    """
    found = checkpoint.get(VERSION_KEY)
    if found == CONTRACT_VERSION or not isinstance(found, str):
        return checkpoint
    if _release(found) > _release(CONTRACT_VERSION):
        warnings.warn(
            f"The checkpoint was written by Lightning {found}, which is newer than the {CONTRACT_VERSION} that this"
            " Milepost knows. It is read as it is; what is new in it may be lost.",
            UserWarning,
            stacklevel=2,
        )
        return checkpoint
    _drop_apex(checkpoint)
    _rename_scaler(checkpoint)
    _rename_checkpointers(checkpoint)
    loops = checkpoint.get("loops")
    if isinstance(loops, dict):
        for name in ("validate_loop", "test_loop", "predict_loop"):
            if name in loops:
                _merge_evaluation_loop(loops[name])
        if "fit_loop" in loops:
            _migrate_fit_loop(loops["fit_loop"], checkpoint)
    checkpoint.setdefault(f"legacy_{VERSION_KEY}", found)
    checkpoint[VERSION_KEY] = CONTRACT_VERSION
    return checkpoint


def require_loops(checkpoint: _Dict) -> None:
    """Raise ResumeError if the file does not say how far the run had come: those before Lightning 1.6 do not."""
    if "fit_loop" in checkpoint.get("loops", {}):
        return
    version = checkpoint.get(f"legacy_{VERSION_KEY}") or checkpoint.get(VERSION_KEY) or "an unknown version"
    raise ResumeError(
        f"The checkpoint (Lightning {version}) holds no progress of the fit loop, so training cannot go on from it."
        " Files older than Lightning 1.6 are upgraded with Lightning's own `python -m"
        " pytorch_lightning.utilities.upgrade_checkpoint`; the weights alone load with load_from_checkpoint."
    )


def watched_values(checkpoint: _Dict, path: str) -> dict[str, torch.Tensor]:
    """What a file of Lightning tells of the values last logged: it keeps none, but those that its callbacks watched.

    A checkpointer lists the scores of the files that it keeps: this file's by its name, or by the step in the name; an
    early stopping that has just seen an improvement holds the value in ``best_score``. A plateau scheduler that
    watches the same metric can then take the step which Lightning leaves out when it resumes.

    Args:
        checkpoint: as read and migrated.
        path: of the file; its last part is looked up.
    """
    values: dict[str, torch.Tensor] = {}
    for key, state in (checkpoint.get("callbacks") or {}).items():
        if not isinstance(state, dict):
            continue
        if str(key).startswith("EarlyStopping{") and state.get("wait_count") == 0:
            monitor = re.search(r"'monitor': '([^']+)'", key)
            if monitor and isinstance(best := state.get("best_score"), torch.Tensor) and best.isfinite():
                values[monitor[1]] = best
    for state in (checkpoint.get("callbacks") or {}).values():
        if isinstance(state, dict) and isinstance(state.get("best_k_models"), dict) and state.get("monitor"):
            for file, score in state["best_k_models"].items():
                name = Path(file).name
                steps = re.search(r"step=(\d+)", name)
                if name == Path(path).name or (steps and int(steps[1]) == checkpoint["global_step"]):
                    values[state["monitor"]] = torch.as_tensor(score)
    return values


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version: what follows them (rc1, .dev0, +local) does not change the layout."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()


def _drop_apex(checkpoint: _Dict) -> None:
    if checkpoint.pop("amp_scaling_state", None) is not None:
        warnings.warn(
            "The checkpoint holds the state of apex's mixed precision, which is not supported: it is left out, and the"
            " loss scale starts anew. Resume with precision='16-mixed' or 'bf16-mixed'.",
            UserWarning,
            stacklevel=3,
        )


def _rename_scaler(checkpoint: _Dict) -> None:
    for old in _SCALER_KEYS:
        if (state := checkpoint.pop(old, None)) is not None:
            checkpoint.setdefault("MixedPrecision", state)


def _rename_checkpointers(checkpoint: _Dict) -> None:
    states = checkpoint.get("callbacks")
    if not isinstance(states, dict):
        return
    renamed: _Dict = {}
    for key, state in states.items():
        new = key
        if isinstance(key, str) and key.startswith("ModelCheckpoint"):
            new = re.sub(r", 'save_on_train_epoch_end': (None|True|False)", "", key)
        number = 2
        while new in renamed:  # two that differed in that alone: told apart as ours are, by their order
            new, number = f"{new.split('#')[0]}#{number}", number + 1
        renamed[new] = state
    checkpoint["callbacks"] = renamed


def _merge_evaluation_loop(loop: _Dict) -> None:
    loop.pop("dataloader_progress", None)
    for key in [k for k in loop if k.startswith("epoch_loop.")]:
        loop[key.removeprefix("epoch_loop.")] = loop.pop(key)


def _migrate_fit_loop(loop: _Dict, checkpoint: _Dict) -> None:
    loop.pop("epoch_loop.val_loop.dataloader_progress", None)
    own_state = loop.pop("epoch_loop.batch_loop.state_dict", None)  # a user's own batch loop may have had one
    for old, new in _MOVED.items():
        for key in [k for k in loop if k.startswith(old)]:
            loop[new + key.removeprefix(old)] = loop.pop(key)
    loop.setdefault("epoch_loop.val_loop.batch_progress", Progress().state_dict(last=True))
    state = loop.setdefault("epoch_loop.state_dict", {})
    if own_state:
        state["old_batch_loop_state_dict"] = own_state
    state.setdefault("_batches_that_stepped", checkpoint["global_step"])
    if _AUTOMATIC in loop:
        loop[_AUTOMATIC].pop("optimizer_position", None)
        if _MANUAL in loop and len(checkpoint.get("optimizer_states", ())) > 1:
            _count_as_manual(loop)


def _count_as_manual(loop: _Dict) -> None:
    """Several optimizers stepped automatically: that module is a manual one by now, and global_step counts on."""
    automatic, manual = loop[_AUTOMATIC]["optimizer"]["step"], loop[_MANUAL]
    if manual["total"]["completed"] == 0:
        for span in ("total", "current"):
            manual[span] = dict(automatic[span])
