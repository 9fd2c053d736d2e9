"""The import rules of the design: which part may import which, no cycles, and no torch where none belongs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import milepost

SOURCE = Path(milepost.__file__).parent

# part: the parts it may import, itself apart; `FOUNDATION` may be imported by anyone.
FOUNDATION = {"errors", "_optional", "_lazy", "_distributed", ""}
TRAINING_PARTS = {
    "accelerators",
    "callbacks",
    "core",
    "data",
    "loggers",
    "plugins",
    "precision",
    "profilers",
    "strategies",
}
MAY_IMPORT: dict[str, set[str]] = {
    "storage": {"errors", "_optional", "_lazy"},
    "format": {"errors", "_optional", "_lazy"},
    "engine": FOUNDATION | {"storage", "format"},
    "plugins": FOUNDATION | {"engine", "storage", "format"},  # the one bridge to the engine half
    "strategies": FOUNDATION | {"plugins", "precision", "accelerators", "core"},
    "trainer": FOUNDATION | TRAINING_PARTS | {"utilities"},
    "integrations": FOUNDATION | {"engine", "storage", "format", "plugins"},
}
FORBIDDEN: dict[str, set[str]] = {
    part: {"storage", "format", "engine", "trainer", "cli", "integrations"}
    for part in ("callbacks", "core", "data", "loggers", "precision", "accelerators", "profilers")
}
# Leaves of a part that others may import although the part itself is closed to them: they import nothing of Milepost's.
OPEN_LEAVES = {
    "callbacks": {"milepost.engine.retention"},
    "core": {"milepost.trainer.transfer"},
    "precision": {"milepost.trainer.transfer"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(tree: ast.AST, name: str, is_package: bool, *, inside_functions: bool) -> Iterator[str]:
    """Absolute names of what a module imports at run time: `from a import b` is a.b if that is a module, else a."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            for other in node.orelse:  # type: ignore[attr-defined]
                yield from imports_of(other, name, is_package, inside_functions=inside_functions)
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not inside_functions:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if is_package else name.split(".")[:-1]
            kept = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*kept, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base
        else:
            yield from imports_of(node, name, is_package, inside_functions=inside_functions)


def imported(name: str, *, inside_functions: bool) -> set[str]:
    path = FILES[name]
    tree = ast.parse(path.read_text(), str(path))
    return set(imports_of(tree, name, path.name == "__init__.py", inside_functions=inside_functions))


def part_of(name: str) -> str:
    """The first component below the package; the package itself is ''."""
    return name.split(".")[1] if "." in name else ""


def violations(name: str) -> list[str]:
    part, found = part_of(name), []
    for target in sorted(imported(name, inside_functions=True)):
        if target.split(".")[0] != "milepost" or part_of(target) == part:
            continue
        other = part_of(target)
        allowed = MAY_IMPORT.get(part)
        wrong = other not in allowed if allowed is not None else other in FORBIDDEN.get(part, set())
        if target in OPEN_LEAVES.get(part, set()):
            wrong = False
        if other == "testing":
            wrong = True
        if wrong:
            found.append(f"{name} imports {target}")
    return found


@pytest.mark.parametrize("name", FILES)
def test_module_imports_only_what_its_part_may(name: str) -> None:
    assert violations(name) == []


@pytest.mark.parametrize("name", [name for name in FILES if part_of(name) in ("storage", "format")])
def test_bytes_stratum_imports_no_torch(name: str) -> None:
    assert not {target for target in imported(name, inside_functions=True) if target.split(".")[0] == "torch"}


@pytest.mark.parametrize("name", sorted(set().union(*OPEN_LEAVES.values())))
def test_open_leaves_import_nothing_of_the_package_but_errors(name: str) -> None:
    own = {target for target in imported(name, inside_functions=True) if target.split(".")[0] == "milepost"}
    assert own <= {"milepost.errors"}


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: imported(name, inside_functions=False) & FILES.keys() for name in FILES}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for target in sorted(graph[name]):
            visit(target, [*path, name])
        done.add(name)

    for name in FILES:
        visit(name, [])


@pytest.mark.parametrize("name", FILES)
def test_every_public_name_resolves(name: str) -> None:
    module = importlib.import_module(name)
    missing = [public for public in getattr(module, "__all__", ()) if getattr(module, public, None) is None]
    assert missing == []


def test_importing_the_package_leaves_torch_alone() -> None:
    code = "import sys, milepost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SOURCE.parent, check=False).returncode == 0


def test_parts_are_attributes_of_the_package_without_an_import_of_their_own() -> None:
    code = "import milepost as pl; pl.callbacks.ModelCheckpoint, pl.loggers.CSVLogger, pl.strategies, pl.plugins"
    assert subprocess.run([sys.executable, "-c", code], cwd=SOURCE.parent, check=False).returncode == 0


def test_importing_the_trainer_leaves_slow_packages_alone() -> None:
    code = "import sys, milepost.trainer.trainer; sys.exit(bool({'torchmetrics', 'tensorboard'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=SOURCE.parent, check=False).returncode == 0


def test_a_forbidden_import_inside_a_function_is_seen() -> None:
    tree = ast.parse("def f():\n    from milepost.engine import retention\n")
    assert list(imports_of(tree, "milepost.trainer.x", False, inside_functions=True)) == ["milepost.engine.retention"]


def test_a_type_checking_import_is_not_seen() -> None:
    tree = ast.parse("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import milepost.engine\n")
    assert list(imports_of(tree, "milepost.trainer.x", False, inside_functions=True)) == ["typing"]


def test_the_annotations_are_offered_to_type_checkers() -> None:
    """Without this file, and without it in the package, a user's type checker takes every name for `Any`."""
    assert (SOURCE / "py.typed").is_file()
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["milepost"] == ["py.typed"]
