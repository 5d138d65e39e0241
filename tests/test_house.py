"""The house stays one that a reader finds the way in: small files, classes and functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import clipfit

PACKAGE = Path(clipfit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MOST = {ast.ClassDef: 150, ast.FunctionDef: 60, ast.AsyncFunctionDef: 60}


def lines(node: ast.AST) -> int:
    assert isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    return int(node.end_lineno or 0) - node.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_too_long_to_read(path):
    text = path.read_text("utf-8")
    assert text.count("\n") <= 400
    long = [
        f"{node.name}: {lines(node)} lines"
        for node in ast.walk(ast.parse(text))
        if type(node) in MOST and lines(node) > MOST[type(node)]
    ]
    assert not long


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_function_with_a_name_is_a_def(path):
    assert "E731" not in path.read_text("utf-8")
