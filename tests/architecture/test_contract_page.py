"""The contract page is true: it names all 25 points, and each test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs/contract.md"
ROWS = re.findall(r"^\| (\d+)\. [^|]+ \|.*\| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
CONTRACT = "contract/test_broken_upstream.py"


def named_in(row: str) -> list[tuple[str, str]]:
    named = [identifier.split("::") for identifier in re.findall(r"`([^`]+)`", row)]
    return [(CONTRACT if file == "contract" else file, name) for file, name in named]


def defined_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_point_has_a_row_and_every_row_a_test() -> None:
    assert [int(point) for point, _ in ROWS] == list(range(1, 26))
    assert all(named_in(row) for _, row in ROWS)


@pytest.mark.parametrize(("point", "row"), ROWS, ids=[point for point, _ in ROWS])
def test_the_tests_that_are_named_exist(point: str, row: str) -> None:
    for file, name in named_in(row):
        assert name in defined_in(file), f"{file}::{name}"
        assert file != CONTRACT or name.startswith(f"test_{int(point):02d}_"), name


def test_every_test_of_the_contract_is_named() -> None:
    named = {name for _, row in ROWS for file, name in named_in(row) if file == CONTRACT}
    assert named == defined_in(CONTRACT)
