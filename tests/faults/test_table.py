"""The table in docs/faults.md and the tests that carry its numbers know of each other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
TABLE = TESTS.parent / "docs" / "faults.md"


def rows() -> list[int]:
    return [
        int(number) for number in re.findall(r"^\| (\d+) \|", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def rows_of(decorator: ast.expr) -> list[int]:
    """The rows in ``@pytest.mark.faults(1, 2)``; none for anything else."""
    if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.faults":
        return [int(ast.literal_eval(argument)) for argument in decorator.args]
    return []


def rows_with_tests() -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for file in sorted(TESTS.rglob("test_*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        whole = [
            row
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
            for row in rows_of(node.value)
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for row in [*whole, *(row for one in node.decorator_list for row in rows_of(one))]:
                    found.setdefault(row, []).append(f"{file.relative_to(TESTS)}::{node.name}")
    return found


def test_the_rows_are_numbered_and_each_is_held_by_a_test():
    numbers = rows()
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) == 28
    tested = rows_with_tests()
    assert sorted(tested) == numbers


def test_a_row_is_held_where_a_user_meets_it():
    """Not by a part of the program alone: every row has a test of a whole command."""
    commands = ("faults/", "commands/", "engine/test_checkpoints.py")
    for row, tests in rows_with_tests().items():
        assert any(test.startswith(commands) for test in tests), f"row {row}: {tests}"
