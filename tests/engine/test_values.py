"""Values as data: exact for us, plain for everybody else, and harmless whoever wrote them."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import gc
import pathlib
import sys
import types
import typing
import warnings
from collections import Counter, OrderedDict, defaultdict, namedtuple
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from milepost.engine import values
from milepost.errors import CheckpointFormatError, UnencodableValueError
from milepost.plugins import TorchCheckpointIO

RAN: list[str] = []  # what code of the classes below has run


class Colour(enum.Enum):
    RED = "red"
    DEEP = (1, Path("x"))


class Level(enum.IntEnum):
    LOW = 3


class Access(enum.Flag):
    READ = 1
    WRITE = 2
    EXECUTE = 4


class Point(NamedTuple):
    x: int
    where: Any = None


OldPoint = namedtuple("OldPoint", "a b")


@dataclasses.dataclass
class Options:
    width: int
    where: Any = None

    def __post_init__(self) -> None:
        RAN.append("__post_init__")
        self.beside = ["not a field"]

    @functools.cached_property
    def costly(self) -> Any:
        return lambda: None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    rate: float
    inner: Any = None


@dataclasses.dataclass
class Armed:
    """Every way in which making an object could run code."""

    path: str = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        RAN.append("__new__")
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        RAN.append("__setattr__")
        object.__setattr__(self, name, value)

    @property
    def trap(self) -> Any:
        return None

    @trap.setter
    def trap(self, value: Any) -> None:
        RAN.append("setter")


@dataclasses.dataclass
class Deletes:
    path: str = ""

    def __del__(self) -> None:
        RAN.append("__del__")


class Config(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        RAN.append("__setitem__")
        super().__setitem__(key, value)


class Ordered(OrderedDict[str, Any]):
    pass


class Custom:
    """Something that is no data."""


def made_config() -> Config:
    config = Config(a=Path("b"))
    config.note = "beside"  # type: ignore[attr-defined]
    return config


def used_options() -> Options:
    options = Options(3, Path("y"))
    assert callable(options.costly)
    return options


SAMPLES: dict[str, Any] = {
    "ordered": OrderedDict([("z", 1), ("a", Path("p"))]),
    "counter": Counter("aab"),
    "defaultdict": defaultdict(list, {"a": [Path("p")]}),
    "defaultdict of none": defaultdict(None, {1: 2}),
    "namedtuple": Point(1, Path("p")),
    "old namedtuple": OldPoint((1, 2), "b"),
    "namespace": argparse.Namespace(rate=0.1, path=Path("p"), nested=argparse.Namespace(a=1)),
    "simple namespace": types.SimpleNamespace(a=Path("p")),
    "slice": slice(1, None, Path("odd")),
    "datetime": datetime(2026, 1, 2, 3, 4, 5, 6),
    "datetime utc": datetime(2026, 1, 2, tzinfo=UTC),
    "datetime offset": datetime(2026, 10, 25, 2, 30, tzinfo=timezone(timedelta(hours=2)), fold=1),
    "date": date(2026, 1, 2),
    "time": time(1, 2, 3, 4),
    "timedelta": timedelta(days=-1, microseconds=1),
    "np datetime": np.datetime64("2026-01-02T03:04:05.000000007", "ns"),
    "np nat": np.datetime64("NaT"),
    "np timedelta": np.timedelta64(25, "s"),
    "np float": np.float64(0.1),
    "np half": np.float16(0.1),
    "np long": np.longdouble("0.1"),
    "np bool": np.bool_(True),
    "np str": np.str_("ü"),
    "np empty str": np.str_(""),
    "np bytes": np.bytes_(b"a"),
    "np complex": np.complex64(1 + 2j),
    "np dtype": np.dtype(">f8"),
    "np dates": np.array(["2026-01-02", "NaT"], dtype="M8[D]"),
    "np table": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    "np big endian": np.array([1.5, -0.0], dtype=">f8"),
    "np empty": np.zeros((0, 3), dtype=np.float32),
    "np scalar array": np.array(7),
    "np flags": np.array([True, False]),
    "np text": np.array(["a", "bü"]),
    "posix": pathlib.PurePosixPath("/a/b"),
    "windows": pathlib.PureWindowsPath("C:\\a"),
    "path": Path("a/b"),
    "frozenset": frozenset({1, (2, 3)}),
    "set": {"b", "a"},
    "set of paths": {Path("a"), Path("b")},
    "range": range(10, 0, -3),
    "complex": complex(-0.0, float("inf")),
    "bytes": b"\x00\xff",
    "bytearray": bytearray(b"\x00\xff"),
    "decimal": Decimal("1.10"),
    "fraction": Fraction(1, 3),
    "uuid": UUID(int=5),
    "dtype": torch.float8_e4m3fn,
    "device": torch.device("cuda:1"),
    "size": torch.Size([1, 2]),
    "layout": torch.strided,
    "colour": Colour.RED,
    "deep enum": Colour.DEEP,
    "level": Level.LOW,
    "flags": Access.READ | Access.EXECUTE,
    "one flag": Access.WRITE,
    "no flag": Access(0),
    "frozen": Frozen(0.5, Point(1)),
    "config": made_config(),
    "ordered subclass": Ordered(z=1, a=Path("p")),
    "keys": {Path("a"): 1, (1, "b"): 2, b"c": 3, None: 4, 1.5: 5, True: 6, frozenset({1}): 7},
    "tuple": (1, (Path("a"), [2])),
    "nested": {"a": [{"b": (Colour.RED, {"c": Path("d")})}]},
    "big int": 2**200,
    "negative zero": -0.0,
    "infinities": [float("inf"), -float("inf")],
}


def assert_exact(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()
    elif isinstance(expected, np.generic):
        assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes()
    elif isinstance(expected, dict):
        for (key, value), (other_key, other) in zip(found.items(), expected.items(), strict=True):
            assert_exact(key, other_key)
            assert_exact(value, other)
        assert vars(found) == vars(expected) if hasattr(expected, "__dict__") else True
        assert getattr(found, "default_factory", 0) is getattr(expected, "default_factory", 0)
    elif isinstance(expected, (list, tuple)):
        for value, other in zip(found, expected, strict=True):
            assert_exact(value, other)
    elif isinstance(expected, (argparse.Namespace, types.SimpleNamespace)):
        assert_exact(vars(found), vars(expected))
    else:
        assert found == expected
        assert isinstance(expected, (set, frozenset)) or repr(found) == repr(expected)  # a set's order is by chance


def saved(tmp_path: Path, **state: Any) -> Path:
    path = tmp_path / "a.ckpt"
    TorchCheckpointIO().save_checkpoint(state, path)
    return path


def assert_plain(value: Any) -> None:
    plain = (type(None), bool, int, float, str, bytes, bytearray, complex, torch.Tensor, torch.Size, torch.dtype)
    if type(value) in (dict, OrderedDict, Counter, list, tuple, set):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            assert_plain(part)
    else:
        assert type(value) in (*plain, torch.device, torch.layout), value


@pytest.mark.parametrize("name", SAMPLES)
def test_it_comes_back_exact_and_others_find_it_plain(tmp_path: Path, name: str) -> None:
    value = SAMPLES[name]
    values.check({"v": value})
    path = saved(tmp_path, v=value, deep=[{"v": value}])
    assert_plain(torch.load(path, weights_only=True)["v"])
    loaded = TorchCheckpointIO().load_checkpoint(path)
    assert_exact(loaded["v"], value)
    assert_exact(loaded["deep"][0]["v"], value)
    assert list(loaded) == ["v", "deep"]


def test_what_others_find_is_the_nearest(tmp_path: Path) -> None:
    plain = torch.load(saved(tmp_path, **SAMPLES), weights_only=True)
    assert plain["path"] == "a/b" and plain["colour"] == "red" and plain["np float"] == 0.1 and plain["level"] == 3
    assert plain["ordered"] == OrderedDict([("z", 1), ("a", "p")]) and plain["counter"] == Counter("aab")
    assert plain["namespace"] == {"rate": 0.1, "path": "p", "nested": {"a": 1}}
    assert plain["frozen"] == {"rate": 0.5, "inner": (1, None)} and plain["datetime"] == "2026-01-02 03:04:05.000006"
    assert plain["np table"].tolist() == [[0, 1, 2], [3, 4, 5]] and plain["np big endian"] == [1.5, 0.0]
    assert plain["decimal"] == "1.10" and plain["defaultdict"] == {"a": ["p"]} and plain["deep enum"] == (1, "x")


def test_lightning_reads_all_of_it_under_weights_only(tmp_path: Path) -> None:
    import pytorch_lightning as pl
    from pytorch_lightning.plugins.io import TorchCheckpointIO as Theirs

    class Model(pl.LightningModule):
        def __init__(self, **given: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.given = given
            self.w = torch.nn.Parameter(torch.zeros(1))

    hparams = {name.replace(" ", "_"): value for name, value in SAMPLES.items()}
    path = saved(
        tmp_path, hyper_parameters=hparams, state_dict={"w": torch.ones(1)}, **{"pytorch-lightning_version": "2.6.6"}
    )
    assert Theirs().load_checkpoint(path, weights_only=True)["hyper_parameters"]["path"] == "a/b"
    model = Model.load_from_checkpoint(path, weights_only=True)
    assert model.given["colour"] == "red" and set(model.given) == set(hparams)


def test_attributes_beside_the_fields_come_back_and_no_code_of_the_class_runs(tmp_path: Path) -> None:
    path = saved(tmp_path, options=used_options(), config=SAMPLES["config"], armed=Armed("x"))
    RAN.clear()
    loaded = TorchCheckpointIO().load_checkpoint(path)
    assert RAN == []
    options = loaded["options"]
    assert options == Options(3, Path("y")) and options.beside == ["not a field"] and "costly" not in vars(options)
    assert loaded["config"].note == "beside" and loaded["armed"].path == "x"


def test_an_array_and_its_exact_form_are_stored_once(tmp_path: Path) -> None:
    assert saved(tmp_path, a=np.zeros(100_000)).stat().st_size < 810_000


def test_a_class_that_is_not_there_leaves_the_plain_value_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, a=Frozen(0.5), b=Colour.RED, c=Point(1), d=Path("x"))
    module = sys.modules[__name__]
    monkeypatch.delattr(module, "Frozen")
    monkeypatch.setattr(module, "Colour", enum.Enum("Colour", "BLUE"))
    monkeypatch.setattr(module, "Point", NamedTuple("Point", [("x", int)]))
    with pytest.warns(UserWarning) as told:
        loaded = TorchCheckpointIO().load_checkpoint(path)
    assert loaded == {"a": {"rate": 0.5, "inner": None}, "b": "red", "c": (1, None), "d": Path("x")}
    assert [str(w.message).split(":")[0] for w in told] == ["a", "b", "c"]
    assert "test_values:Colour.RED is not there" in str(told[1].message)


@pytest.mark.parametrize(
    ("value", "where", "kind"),
    [
        ({"a": (1, [Custom()])}, "a.1.0", "Custom"),
        ({"a": Frozen(1.0, {"deep": {Path("x"): Custom()}})}, "a.inner.deep.x", "Custom"),
        ({"a": argparse.Namespace(b=Custom())}, "a.b", "Custom"),
        ({"a": torch.nn.ReLU}, "a", "type"),
        ({"a": lambda: None}, "a", "function"),
        ({"a": np.array([Custom()], dtype=object)}, "a", "ndarray"),
        ({"a": defaultdict(lambda: 1)}, "a", "defaultdict"),
        ({"a": torch.nn.Linear(1, 1)}, "a", "Linear"),
    ],
)
def test_what_has_no_form_is_named_where_it_lies(value: Any, where: str, kind: str) -> None:
    with pytest.raises(UnencodableValueError, match=kind) as caught:
        values.check(value)
    assert caught.value.key_path == where


def test_what_contains_itself_or_goes_too_deep_is_named() -> None:
    loop: list[Any] = []
    loop.append(loop)
    deep: Any = ()
    for _ in range(100_000):
        deep = [deep]
    for value in (loop, [deep], {"a": (loop,)}):
        with pytest.raises(UnencodableValueError):
            values.check({"v": value})


# ---- files that anybody may have written -------------------------------------------------------------------------

NAMES = [
    "os:system", "subprocess:Popen", "builtins:exec", "builtins:dict", "builtins:tuple", "builtins:object",
    "antigravity:x", "json.tool:main", "xml.dom.minidom:Document", "wsgiref.simple_server:WSGIServer", ":", "", "a",
    "sys:modules.os.system", "milepost:Trainer",
    "lazy_for_test:Thing", "collections:OrderedDict", "torch.nn:Linear", "enum:Enum", "enum:Flag",
    *(f"{__name__}:{cls}" for cls in ("Options", "Frozen", "Armed", "Deletes", "Config", "Ordered", "Point", "Colour",
                                      "Access", "Level", "Custom", "Custom.__init__", "Custom.__dict__", "no such")),
]  # fmt: skip
TAGS = [
    "plain", "enum", "numpy_scalar", "numpy", "numpy_dtype", "list", "tuple", "set", "frozenset", "slice", "namedtuple",
    "omegaconf", "dataclass", "dict", "defaultdict", "Namespace", "SimpleNamespace", "datetime", "time", "date",
    "timedelta", "Decimal", "Fraction", "UUID", "range", "PurePosixPath", "PureWindowsPath", "PosixPath", "WindowsPath",
    "nonsense",
]  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**80, -(2**80), float("nan"), float("inf"), 0.5, 1j, b"", b"abcdefgh", "", "x", "1"]),
    st.sampled_from(["READ", "RED", "trap", "path", "width", "__class__", "__dict__", "where"]),
    st.sampled_from(["1e999999999", "<f8", "<U1", "O", "|O8"]),
    st.sampled_from(["int", "eval", "f4,f4", "<M8[ns]", "2026-01-02", "2026-01-02T00:00:00"]),
    st.sampled_from([torch.ones(2), torch.empty(0).byte(), torch.zeros(8).byte(), torch.float32, torch.Size([1])]),
    st.sampled_from(TAGS),
    st.sampled_from(NAMES),
)  # fmt: skip


def _forms(inner: Any) -> Any:
    form = st.fixed_dictionaries(
        {"type": st.sampled_from(TAGS), "value": inner},
        optional={"class": st.sampled_from(NAMES) | inner, "dtype": SCALARS, "shape": inner, "factory": SCALARS,
                  "attributes": inner, "flags": inner},
    )  # fmt: skip
    pairs = st.lists(st.tuples(inner, inner).map(list), max_size=3)
    return st.one_of(form, form, st.lists(inner, max_size=3), pairs, st.dictionaries(st.sampled_from("abc"), inner))


TREES = st.recursive(SCALARS, _forms, max_leaves=12)
WATCHED = ("import", "open", "exec", "compile", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "code.__new__")


class Watch:
    """Notes what the interpreter says of imports, files and processes while it is on."""

    on = False
    seen: typing.ClassVar[list[Any]] = []

    @classmethod
    def hook(cls, event: str, args: Any) -> None:
        if cls.on and event.startswith(WATCHED):
            cls.seen.append((event, args))


sys.addaudithook(Watch.hook)


class Lazy(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        RAN.append(f"module.{name}")
        raise AttributeError(name)

    def __getattribute__(self, name: str) -> Any:
        if name == "__dict__":
            RAN.append("module.__dict__")
        return super().__getattribute__(name)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> typing.Iterator[None]:
    monkeypatch.setitem(sys.modules, "lazy_for_test", Lazy("lazy_for_test"))
    gc.collect()
    yield
    Watch.on = False


def load_hostile(items: Any) -> None:
    """Loads what a file could hold: only the one kind of error, and nothing of the program's code runs."""
    checkpoint = {"a": {"b": [1, torch.ones(2)]}, "c": OrderedDict(x=1), "milepost": {"values": items}}
    before = set(sys.modules)
    RAN.clear()
    Watch.seen.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Watch.on = True
        try:
            values.from_plain(checkpoint)
        except CheckpointFormatError:
            pass
        finally:
            Watch.on = False
    assert Watch.seen == [] and RAN == [] and set(sys.modules) == before


PATHS = st.sampled_from(
    [["a"], ["a", "b", 0], ["a", "b", 1, 0], ["c", "x"], [], ["no"], ["a", "b", "x"], None, "ab", 5]
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(st.lists(st.fixed_dictionaries({"path": PATHS, "value": TREES}), max_size=3) | TREES)
def test_a_made_up_tree_is_a_format_error_at_worst(watch: None, items: Any) -> None:
    load_hostile(items)


def _mutated(tree: Any, data: Any) -> Any:
    """A copy of `tree` with one of its nodes exchanged, dropped or doubled."""
    if isinstance(tree, dict) and tree and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(tree)))
        changed = dict(tree)
        if data.draw(st.integers(0, 4)) == 0:
            del changed[key]
        else:
            changed[key] = _mutated(tree[key], data)
        return changed
    if isinstance(tree, list) and tree and data.draw(st.booleans()):
        number = data.draw(st.integers(0, len(tree) - 1))
        return [*tree[:number], _mutated(tree[number], data), *tree[number + data.draw(st.integers(0, 1)) :]]
    return data.draw(TREES)


GENUINE = values.to_plain({name: [value] for name, value in SAMPLES.items()})["milepost"]["values"]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(st.data())
def test_a_genuine_tree_that_was_edited_is_a_format_error_at_worst(watch: None, data: Any) -> None:
    item = data.draw(st.sampled_from(GENUINE))
    load_hostile([{"path": ["a"], "value": _mutated(item["value"], data)}])


def test_genuine_trees_run_nothing_either(watch: None) -> None:
    load_hostile([{"path": ["a"], "value": item["value"]} for item in GENUINE])


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_class_imports_or_makes_anything_else(watch: None, name: str) -> None:
    one: Any = {"type": "plain", "value": 1}
    for form in (
        {"type": "enum", "class": name, "value": ["RED"]},
        {"type": "enum", "class": name, "value": []},
        {"type": "namedtuple", "class": name, "value": [one, one]},
        {"type": "dataclass", "class": name, "value": [["path", one]]},
        {"type": "dict", "class": name, "value": [[one, one]], "attributes": []},
    ):
        load_hostile([{"path": ["a"], "value": form}])


def test_a_path_does_not_lead_into_what_was_made(watch: None) -> None:
    config: Any = {"type": "dict", "class": f"{__name__}:Config", "value": [], "attributes": []}
    config["value"] = [[{"type": "plain", "value": "k"}, {"type": "plain", "value": 1}]]
    load_hostile([{"path": ["a"], "value": config}, {"path": ["a", "k"], "value": {"type": "plain", "value": 2}}])


@pytest.mark.parametrize("data", [["1e9999999999"], ["1", 2], [1.5], [1, 0]])
def test_a_fraction_of_text_is_refused_before_it_is_computed(data: Any) -> None:
    with pytest.raises(CheckpointFormatError):
        values.from_plain(
            {"a": 1, "milepost": {"values": [{"path": ["a"], "value": {"type": "Fraction", "value": data}}]}}
        )


@pytest.mark.parametrize("field", ["trap", "__class__", "path", "__dict__"])
def test_attributes_go_past_setters(watch: None, field: str) -> None:
    form = {"type": "dataclass", "class": f"{__name__}:Armed", "value": [[field, {"type": "plain", "value": "x"}]]}
    load_hostile([{"path": ["a"], "value": form}])


def test_a_class_whose_end_would_run_code_is_not_made(watch: None) -> None:
    form = {"type": "dataclass", "class": f"{__name__}:Deletes", "value": [["path", {"type": "plain", "value": "x"}]]}
    load_hostile([{"path": ["a"], "value": form}])
    gc.collect()
    assert RAN == []


def test_forms_that_contain_themselves_or_each_other_many_times_over_end_soon(watch: None) -> None:
    circle: dict[str, Any] = {"type": "list", "value": []}
    circle["value"].append(circle)
    shared: dict[str, Any] = {"type": "plain", "value": 1}
    for _ in range(200):
        shared = {"type": "list", "value": [shared, shared]}
    deep: dict[str, Any] = {"type": "plain", "value": 1}
    for _ in range(100_000):
        deep = {"type": "list", "value": [deep]}
    for form in (circle, shared, deep):
        load_hostile([{"path": ["a"], "value": form}])
    with pytest.raises(CheckpointFormatError, match=r"values\.0.*contains itself"):
        values.from_plain({"a": 1, "milepost": {"values": [{"path": ["a"], "value": circle}]}})


def test_a_hostile_file_on_disk_is_a_format_error(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"a": 1, "milepost": {"values": [{"path": ["a"], "value": {"type": "numpy", "value": 1}}]}}, path)
    with pytest.raises(CheckpointFormatError, match=r"milepost\.values\.0"):
        TorchCheckpointIO().load_checkpoint(path)


# ---- OmegaConf ---------------------------------------------------------------------------------------------------


def test_a_config_comes_back_as_one_with_its_interpolations_and_flags(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    given: dict[str, Any] = {"seed": 1, "net": {"lr": "${rate}", "sizes": [1, None, {"a": 0.5}]}, "rate": 0.1}
    config = omegaconf.OmegaConf.create({**given, "colour": Colour.RED, "where": Path("x"), 3: "???"})
    omegaconf.OmegaConf.set_readonly(config, True)
    values.check({"cfg": config})
    path = saved(tmp_path, cfg=config, sizes=config.net.sizes, both=(config, Path("y")))
    plain = torch.load(path, weights_only=True)
    assert plain["cfg"] == {**given, "colour": "red", "where": "x", 3: "???"} and plain["sizes"] == [
        1,
        None,
        {"a": 0.5},
    ]
    loaded = TorchCheckpointIO().load_checkpoint(path)
    assert type(loaded["cfg"]) is omegaconf.DictConfig and loaded["cfg"] == config and loaded["cfg"].net.lr == 0.1
    assert loaded["cfg"].colour is Colour.RED and omegaconf.OmegaConf.is_readonly(loaded["cfg"])
    assert type(loaded["sizes"]) is omegaconf.ListConfig and loaded["sizes"][2].a == 0.5
    assert type(loaded["both"][0]) is omegaconf.DictConfig


@pytest.mark.parametrize("data", ["a: 1", 5, {"a": Point(1)}, {"a": Options(1)}, [torch.ones(1)], {"a": object()}])
def test_a_config_is_made_of_its_own_kind_of_values_only(watch: None, data: Any) -> None:
    pytest.importorskip("omegaconf")
    form: Any = {"type": "omegaconf", "flags": [False, False], "value": {"type": "plain", "value": data}}
    load_hostile([{"path": ["a"], "value": form}])
    with pytest.raises(CheckpointFormatError):
        values.from_plain({"a": 1, "milepost": {"values": [{"path": ["a"], "value": form}]}})


def test_without_omegaconf_the_plain_value_stays_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    form: Any = {"type": "omegaconf", "flags": [False, False], "value": {"type": "plain", "value": {"a": 1}}}
    with pytest.warns(UserWarning, match="omegaconf"):
        assert values.from_plain({"a": 1, "milepost": {"values": [{"path": ["a"], "value": form}]}}) == {"a": 1}
