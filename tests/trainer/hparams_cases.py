"""Classes that keep their hyper-parameters in every way that Lightning's users do; `side` is either library."""

from __future__ import annotations

import functools
import inspect
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def cases(side: Any) -> dict[str, Callable[[], Any]]:
    """Functions that each build one object, by name."""

    M = side.LightningModule
    out: dict[str, Callable[[], Any]] = {}

    def case(function: Callable[[], Any]) -> Callable[[], Any]:
        out[function.__name__] = function
        return function

    @case
    def all_arguments():
        class A(M):
            def __init__(self, a, b=2, *rest, c=3, **more):
                super().__init__()
                self.save_hyperparameters()

        return A(1, 5, 9, c=4, d=6)

    @case
    def by_name():
        class A(M):
            def __init__(self, a, b=2, c=3):
                super().__init__()
                self.save_hyperparameters("a", "c")

        return A(1)

    @case
    def ignoring():
        class A(M):
            def __init__(self, a, b=2, c=3):
                super().__init__()
                self.save_hyperparameters(ignore=["b"])

        return A(1)

    @case
    def ignoring_str():
        class A(M):
            def __init__(self, a, b=2, c=3):
                super().__init__()
                self.save_hyperparameters(ignore="b")

        return A(1)

    @case
    def ignoring_a_tuple():
        class A(M):
            def __init__(self, a, b=2, c=3):
                super().__init__()
                self.save_hyperparameters(ignore=("b", "c"))

        return A(1)

    @case
    def unknown_name():
        class A(M):
            def __init__(self, a):
                super().__init__()
                self.save_hyperparameters("z")

        return A(1)

    @case
    def one_dict():
        class A(M):
            def __init__(self, conf, other=1):
                super().__init__()
                self.save_hyperparameters(conf)

        return A({"x": 1, "y": [2]})

    @case
    def empty_dict():
        class A(M):
            def __init__(self, conf):
                super().__init__()
                self.save_hyperparameters(conf)

        return A({})

    @case
    def one_namespace():
        class A(M):
            def __init__(self, conf):
                super().__init__()
                self.save_hyperparameters(conf)

        return A(Namespace(x=1))

    @case
    def one_dataclass():
        @dataclass
        class C:
            x: int = 1

        class A(M):
            def __init__(self, conf):
                super().__init__()
                self.save_hyperparameters(conf)

        return A(C())

    @case
    def dict_built_inside():
        class A(M):
            def __init__(self, a):
                super().__init__()
                self.save_hyperparameters({"made": a})

        return A(3)

    @case
    def kwargs_dict():
        class A(M):
            def __init__(self, **kw):
                super().__init__()
                self.save_hyperparameters(kw)

        return A(x=3)

    @case
    def primitive():
        class A(M):
            def __init__(self, a):
                super().__init__()
                self.save_hyperparameters(5)

        return A(3)

    @case
    def a_list():
        class A(M):
            def __init__(self, a):
                super().__init__()
                self.save_hyperparameters([1])

        return A(3)

    @case
    def twice():
        class A(M):
            def __init__(self, a, b):
                super().__init__()
                self.save_hyperparameters("a")
                self.save_hyperparameters("b", logger=False)

        return A(3, 4)

    @case
    def twice_dict():
        class A(M):
            def __init__(self, a, conf):
                super().__init__()
                self.save_hyperparameters("a")
                self.save_hyperparameters(conf)

        return A(3, {"q": 4})

    @case
    def dict_and_name():
        class A(M):
            def __init__(self, a, conf):
                super().__init__()
                self.save_hyperparameters(conf, "a")

        return A(3, {"q": 4})

    @case
    def reassigned():
        class A(M):
            def __init__(self, a):
                a = a * 2
                super().__init__()
                self.save_hyperparameters()

        return A(3)

    @case
    def inheritance():
        class A(M):
            def __init__(self, a, common=1, **kw):
                super().__init__()
                self.save_hyperparameters()

        class B(A):
            def __init__(self, b, common=2, **kw):
                super().__init__(a=b + 1, common=common + 5, **kw)

        return B(3, z=1)

    @case
    def inheritance_both():
        class A(M):
            def __init__(self, a):
                super().__init__()
                self.save_hyperparameters()

        class B(A):
            def __init__(self, b, c):
                super().__init__(a=b + 1)
                self.save_hyperparameters(ignore="c")

        return B(3, 4)

    @case
    def inheritance_of_three():
        class A(M):
            def __init__(self, a=1):
                super().__init__()
                self.save_hyperparameters()

        class B(A):
            def __init__(self, b=2):
                super().__init__(a=7)

        class C(B):
            def __init__(self, c=3):
                super().__init__()

        return C()

    @case
    def inheritance_ignoring():
        class A(M):
            def __init__(self, a=1, x=2):
                super().__init__()
                self.save_hyperparameters(ignore=["x"])

        class B(A):
            def __init__(self, b=2, x=3):
                super().__init__(a=7, x=x)

        return B()

    @case
    def mixin():
        class Mix:
            def __init__(self, m=1):
                pass

        class A(M, Mix):
            def __init__(self, a=1):
                M.__init__(self)
                Mix.__init__(self, 4)
                self.save_hyperparameters()

        return A()

    @case
    def from_a_method():
        class A(M):
            def __init__(self, a=1):
                super().__init__()
                self.keep()

            def keep(self):
                self.save_hyperparameters()

        return A(2)

    @case
    def with_frame():
        class A(M):
            def __init__(self, a=1):
                super().__init__()
                self.keep(inspect.currentframe())

            def keep(self, frame):
                self.save_hyperparameters(frame=frame)

        return A(2)

    @case
    def child_in_parent():
        class Child(M):
            def __init__(self, c=1):
                super().__init__()
                self.save_hyperparameters()

        class Parent(M):
            def __init__(self, p=1):
                super().__init__()
                self.child = Child(8)
                self.save_hyperparameters()

        return Parent(2).child

    @case
    def no_arguments():
        class A(M):
            def __init__(self):
                super().__init__()
                self.save_hyperparameters()

        return A()

    @case
    def never():
        class A(M):
            def __init__(self, a=1):
                super().__init__()

        return A()

    @case
    def dataclass_module():
        @dataclass
        class D(side.LightningDataModule):
            x: int = 1

            def __post_init__(self):
                super().__init__()
                self.save_hyperparameters()

        return D(4)

    @case
    def a_module_argument():
        class A(M):
            def __init__(self, net, a=1):
                super().__init__()
                self.save_hyperparameters()
                self.net = net

        return A(torch.nn.Linear(1, 1))

    @case
    def mutated():
        class A(M):
            def __init__(self, a, items_):
                super().__init__()
                self.save_hyperparameters()
                self.hparams.a = 9
                self.hparams.items_.append(1)
                self.hparams.new = 3

        return A(1, [])

    @case
    def setter():
        class A(M):
            def __init__(self, a):
                super().__init__()
                self.hparams = {"a": a}

        return A(1)

    @case
    def keyword_only():
        class A(M):
            def __init__(self, *, a, b=3):
                super().__init__()
                self.save_hyperparameters()

        return A(a=1)

    @case
    def strange_self():
        class A(M):
            def __init__(this, a):
                super().__init__()
                this.save_hyperparameters()

        return A(1)

    @case
    def frame_named_arg():
        class A(M):
            def __init__(self, frame=1, a=2):
                super().__init__()
                self.save_hyperparameters()

        return A()

    @case
    def wrapped_init():
        def deco(f):
            @functools.wraps(f)
            def inner(self, *a, **k):
                return f(self, *a, **k)

            return inner

        class A(M):
            @deco
            def __init__(self, a, b=2):
                super().__init__()
                self.save_hyperparameters()

        return A(1)

    return out
