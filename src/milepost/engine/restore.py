"""Putting a stored state back into live objects, in place: into the tensors that are there, by one pass over the bytes.

All is checked before anything is touched: keys, types, shapes; then pieces are read, verified and copied.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from milepost import _distributed
from milepost._distributed import OfAllRanks, PerRank
from milepost.engine import optimizers
from milepost.engine.directory import DirectoryEngine
from milepost.engine.loading import owned_tree
from milepost.engine.locating import Located, Ref
from milepost.engine.reader import StoredCheckpoint
from milepost.engine.report import RestoreReport
from milepost.engine.state import rebuild, references
from milepost.errors import MisconfigurationException, ResumeError
from milepost.format.codec import PartsRef, TensorRef

_MODULE_LOAD = nn.Module.load_state_dict


def collect(state: Mapping[str, Any]) -> dict[str, Any]:
    """What is saved of `state`: for an object with `state_dict` that, else the value itself."""
    return {key: _collected(value) for key, value in state.items()}


def _collected(value: Any) -> Any:
    if isinstance(value, PerRank):
        return PerRank(_collected(value.value))
    if not _stateful(value):
        return value
    return PerRank(value.state_dict()) if getattr(value, "per_rank", False) else value.state_dict()


def restore(
    engine: DirectoryEngine,
    stored: StoredCheckpoint,
    state: MutableMapping[str, Any],
    parts: Collection[str] | None = None,
    strict: bool = True,
) -> RestoreReport:
    """Put `stored` into `state`.

    Modules, optimizers and nested containers take the tensors into their own memory, each rank the part of a DTensor
    that it holds; other objects get a new state through `load_state_dict`; plain values in `state` are replaced.

    Args:
        parts: keys of `state` that take part; None: all.
        strict: whether all of them must be there and fit. Else what does not stays as it was, and the report says so.

    Raises:
        ResumeError: something of `state` is not in the checkpoint, or has another shape or type. Nothing was touched.
        CheckpointCorruptError: a piece is damaged. What was read before it has been overwritten: restore from another
            checkpoint, which overwrites it all, before going on.
    """
    return _Restoring(engine, stored, state, parts, strict).run()


class _Restoring:
    """One restore: what is stored, what is there, and which of it belongs together."""

    def __init__(
        self,
        engine: DirectoryEngine,
        stored: StoredCheckpoint,
        state: MutableMapping[str, Any],
        parts: Collection[str] | None,
        strict: bool,
    ) -> None:
        if parts is not None and (unknown := sorted(set(parts) - set(state))):
            raise MisconfigurationException(f"parts names {unknown}; the state has {sorted(state)}.")
        self._engine = engine
        self._stored = stored
        self._state = state
        self._strict = strict
        self._located = Located(stored, _distributed.rank())
        self._tree = owned_tree(stored)
        self._report = RestoreReport(stored.head.step, {k: "restored" for k in state if parts is None or k in parts})
        self._live: dict[Ref, list[torch.Tensor]] = {}
        self._fresh: set[int] = set()  # ids of parameters that the checkpoint has nothing for

    def run(self) -> RestoreReport:
        chosen = self._chosen()
        # modules first: an optimizer's state goes with the parameters that are restored
        for key in sorted(chosen, key=lambda key: not isinstance(chosen[key], nn.Module)):
            tree = self._fitting(key, chosen[key], self._tree[key])
            if tree is None:
                self._report.parts[key] = "left out"
                del chosen[key]
            else:
                self._tree[key] = tree
        wanted = references({key: self._tree[key] for key in chosen})
        tensors = self._engine.read_tensors(self._stored, wanted, self._live, self._located)
        for key in sorted(chosen, key=lambda key: bool(getattr(chosen[key], "restored_last", False))):
            made = rebuild(self._tree[key], tensors.__getitem__)
            self._take(key, chosen[key], made)
        return self._report

    def _chosen(self) -> dict[str, Any]:
        """The values that are to be restored and can be, out of their marks."""
        report = self._report
        wanted = list(report.parts)
        if missing := sorted(set(wanted) - set(self._tree)):
            if self._strict:
                raise ResumeError(
                    f"{self._stored.path} has nothing under {missing}; it holds {sorted(self._tree)}. Give restore the"
                    " keys that save was given, or strict=False."
                )
            report.missing += missing
            report.parts |= dict.fromkeys(missing, "not in the checkpoint")
        report.parts |= {key: "left out" for key in self._state if key not in report.parts}
        report.unused += sorted(set(self._tree) - set(self._state))
        return {key: _unmarked(self._state[key]) for key in wanted if key in self._tree}

    # ---- what belongs together -------------------------------------------------------------------------------------

    def _fitting(self, key: str, value: Any, tree: Any) -> Any:
        """What of the stored `tree` fits `value`; None where nothing does. Notes the tensors that take it."""
        if isinstance(value, nn.Module):
            return self._fitting_module(key, value, tree)
        if isinstance(value, Optimizer):
            return self._fitting_optimizer(key, value, tree)
        self._match(tree, value if isinstance(value, (dict, list, tuple, torch.Tensor)) else None)
        return tree

    def _fitting_module(self, key: str, module: nn.Module, tree: Any) -> Any:
        """A module must find each of its names, with its shape and type."""
        live, saved = module.state_dict(), tree if isinstance(tree, dict) else {}
        lacking, unused = sorted(set(live) - set(saved)), sorted(set(saved) - set(live))
        if self._strict and (lacking or unused):
            raise ResumeError(
                f"{self._stored.path} does not fit {type(module).__name__} under {key!r}: it lacks {lacking}, and holds"
                f" {unused}, which the module has not. Build the model as it was when it was saved, or restore with"
                " strict=False."
            )
        unfit = {name: why for name, item in saved.items() if name in live and (why := self._unfit(item, live[name]))}
        if self._strict and unfit:
            name, why = next(iter(unfit.items()))
            raise ResumeError(f"{key}.{name}: {why}. Build the model as it was when it was saved.")
        self._report.missing += [f"{key}.{name}" for name in lacking]
        self._report.unused += [f"{key}.{name}" for name in unused]
        self._report.unfit |= {f"{key}.{name}": why for name, why in unfit.items()}
        if lacking or unfit:
            self._report.parts[key] = "restored in part"
            kept = {*lacking, *unfit}
            self._fresh |= {id(p) for name, p in module.named_parameters(remove_duplicate=False) if name in kept}
        fitting = {name: item for name, item in saved.items() if name in live and name not in unfit}
        if not fitting and live:
            return None
        self._match(fitting, live)
        return fitting

    def _fitting_optimizer(self, key: str, optimizer: Optimizer, tree: Any) -> Any:
        why = optimizers.unfit(optimizer, tree)
        if why is not None:
            if self._strict:
                raise ResumeError(f"{self._stored.path} does not fit {type(optimizer).__name__} under {key!r}: {why}.")
            self._report.unfit[key] = why
            return None
        tree, left = optimizers.without(optimizer, tree, self._fresh)
        if left:
            self._report.unfit |= {f"{key}.state.{n}": "its parameter was not restored" for n in left}
            self._report.parts[key] = "restored in part"
        self._match(tree, optimizer.state_dict())
        for ref, made in optimizers.new_shards(optimizer, tree, self._live, self._located):
            self._live[ref] = [made]
        return tree

    def _match(self, tree: Any, value: Any) -> None:
        """Find for each stored tensor the live ones with the same key path; those that do not fit are replaced."""
        if isinstance(tree, (TensorRef, PartsRef)):
            if isinstance(value, torch.Tensor) and self._unfit(tree, value) is None:
                self._note(tree, value.detach())
        elif isinstance(tree, dict) and isinstance(value, Mapping):
            for key, inner in tree.items():
                self._match(inner, value.get(key))
        elif isinstance(tree, (list, tuple)) and isinstance(value, (list, tuple)):
            for inner, item in zip(tree, value, strict=False):
                self._match(inner, item)

    def _note(self, ref: Ref, tensor: torch.Tensor) -> None:
        """One stored tensor may be two here, each of which takes the bytes; what is one here takes them once."""
        known = self._live.setdefault(ref, [])
        if not any(_same_memory(tensor, other) for other in known):
            known.append(tensor)

    def _unfit(self, ref: Any, tensor: Any) -> str | None:
        """Why a live tensor cannot take what is stored, None where it can."""
        if not isinstance(ref, (TensorRef, PartsRef)) or not isinstance(tensor, torch.Tensor):
            return None
        dtype, shape = self._located.type_of(ref)
        if (tuple(tensor.shape), tensor.dtype) == (shape, dtype):
            return None
        return (
            f"{self._stored.path} holds {dtype} of shape {list(shape)}, the live tensor is {tensor.dtype} of shape"
            f" {list(tensor.shape)}"
        )

    # ---- handing over ----------------------------------------------------------------------------------------------

    def _take(self, key: str, value: Any, made: Any) -> None:
        mark = self._state[key]
        several = len(self._stored.head.rank_trees()) or 1
        if _of_each_rank(mark) and several == 1 != _distributed.world_size():
            made = OfAllRanks((made,))
        given = self._give(value, made)
        if isinstance(mark, PerRank):
            given = mark if given is value else PerRank(given)
        self._state[key] = given

    def _give(self, value: Any, made: Any) -> Any:
        """Hand the rebuilt state to `value`; returns what then stands under its key."""
        if isinstance(value, nn.Module):
            _give_module(value, made, self._strict)
            return value
        if isinstance(value, Optimizer) and type(value).load_state_dict is Optimizer.load_state_dict:
            try:
                optimizers.give(value, made)
            except Exception as error:  # its own code meets what the file holds
                raise ResumeError(f"{type(value).__name__} does not take its stored state: {error!r}.") from error
            return value
        if _stateful(value):
            value.load_state_dict(made)
            return value
        if isinstance(value, dict) and isinstance(made, dict):
            if self._strict:
                value.clear()
            value.update(made)
            return value
        return made


def _stateful(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _of_each_rank(value: Any) -> bool:
    return isinstance(value, PerRank) or bool(getattr(value, "per_rank", False))


def _unmarked(value: Any) -> Any:
    return value.value if isinstance(value, PerRank) else value


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    if type(one) is not type(other):
        return False
    if type(one) is torch.Tensor:
        return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return one is other


def _give_module(module: nn.Module, made: dict[str, Any], strict: bool) -> None:
    """The tensors are in place already; what is no tensor is loaded by the module itself."""
    plain = all(isinstance(item, torch.Tensor) for item in made.values())
    if not plain or type(module).load_state_dict is not _MODULE_LOAD:
        module.load_state_dict(made, strict=strict)
