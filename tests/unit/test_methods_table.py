"""The table of methods: its tests exist, none of its cells is empty, and what is written is what it says."""

from __future__ import annotations

import ast

import pytest

from tests.methods import table
from tests.methods.contract import METHODS, made

CONTRACT = [f"{test}[{name}-{size}]" for name in METHODS for test in (table.DEFINED, table.PARTS) for size in (1, 2, 3, 4)]


def passed() -> list[str]:
    """Every test that the table names, as if it had passed."""
    return [test + "1]" if test.endswith("-") else test for test in table.COVERS] + CONTRACT


@pytest.mark.parametrize("named", [*table.COVERS, table.DEFINED, table.PARTS], ids=lambda test: test.split("/")[-1])
def test_a_test_that_the_table_names_is_there(named: str) -> None:
    path, _, test = named.partition("[")[0].partition("::")
    defined = {node.name for node in ast.parse((table.ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert test in defined
    assert set(table.COVERS.get(named, ((), ()))[1]) <= set(table.NAMES)


def test_no_cell_is_empty_and_the_written_table_is_this_one() -> None:
    found = table.cells(passed())
    assert table.empty(found) == []
    assert table.OUT.read_text() == table.written(found)


def test_a_test_that_did_not_pass_leaves_its_cells_empty() -> None:
    golden = "tests/unit/test_selectors.py::test_moba_golden"
    without = [test for test in passed() if test not in (golden, f"{table.DEFINED}[NSA-3]")]
    assert {("MoBA", "golden"), ("NSA", "forward"), ("NSA", "1 2 3 4 ranks"), ("NSA", "backward")} == set(table.empty(table.cells(without)))
    assert made("MoBA").untrained == "" and "Quest" in table.NAMES


def test_reasons_are_for_methods_and_columns_that_are_there() -> None:
    assert all(name in table.NAMES and column in table.COLUMNS and reason for (name, column), reason in table.REASONS.items())
