"""LambdaCallback runs the functions it is given, and knows every hook."""

from __future__ import annotations

from typing import Any

import pytest

from milepost.callbacks import Callback, LambdaCallback
from milepost.callbacks.lambda_callback import HOOKS
from milepost.errors import MisconfigurationException


def test_every_hook_can_be_given() -> None:
    calls: list[Any] = []
    hooks: dict[str, Any] = {name: lambda *a, name=name: calls.append((name, a)) for name in HOOKS}
    callback = LambdaCallback(**hooks)
    for name in sorted(HOOKS):
        getattr(callback, name)(1, 2)
    assert calls == [(name, (1, 2)) for name in sorted(HOOKS)]
    assert {"on_save_checkpoint", "on_load_checkpoint", "state_dict", "setup", "on_train_batch_end"} <= HOOKS


def test_none_keeps_the_hook_and_unknown_names_are_refused() -> None:
    assert LambdaCallback(state_dict=None).state_dict() == Callback().state_dict()
    with pytest.raises(MisconfigurationException, match="on_trian_end"):
        LambdaCallback(on_trian_end=print)
