"""docs/inputs.md cannot drift: every row names a test, and every test that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "inputs.md"


def rows() -> list[list[str]]:
    """The cells of every row of the page's tables, but for their heads."""
    lines = [line.strip("| ") for line in PAGE.read_text("utf-8").splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line) for line in lines]
    return [row for row in cells if not set("".join(row)) <= set("-: ") and "test" not in row[-1].split()]


def test_every_row_names_a_test_that_is_there():
    trees = [ast.parse(path.read_text("utf-8")) for path in TESTS.glob("test_*.py")]
    there = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert len(rows()) > 30
    for row in rows():
        named = re.findall(r"`(test_\w+)`", row[-1])
        assert named, f"no test in the row {row[0]!r}"
        assert set(named) <= there, f"no such test: {set(named) - there}"
