"""docs/formats.md has a cell for every format, part, type and kind of run, and none beyond its bound."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from clipfit.config import outputs
from clipfit.formats import FORMATS, difference, proof

DOCS = Path(__file__).parent.parent / "docs"
CELL = re.compile(r"(\S+) · (\d+) · (\d+)")


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(DOCS / "formats.py"))


@pytest.fixture(scope="module")
def page() -> str:
    return (DOCS / "formats.md").read_text("utf-8")


@pytest.fixture(scope="module")
def table(page) -> dict[tuple[str, str, str], dict[str, str]]:
    """(format, part, type) → kind of run → cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    headings, _, *rows = lines[: next((k for k, line in enumerate(lines) if "other choices" in line), None)]
    return {tuple(row[:3]): dict(zip(headings[4:], row[4:], strict=True)) for row in rows}


def test_every_format_part_type_and_kind_of_run_has_its_cell(table, script):
    asked = [(name, part, kind) for name, takes in outputs.FORMATS.items() for part in takes.part or ("",)
             for kind in (*takes.dtype, *takes.quantize)]  # fmt: skip
    chosen = [(name, part, "chosen" if name == "difference" else kind) for name, part, kind in asked]
    assert [(name.strip("`"), part, kind) for name, part, kind in table] == chosen
    assert {name for name, _, _ in chosen} == set(FORMATS)
    for row in table.values():
        assert list(row) == list(script["SUBJECTS"])


def test_no_cell_is_beyond_its_bound_and_no_clear_label_is_another(table):
    bounds = {**proof.BOUNDS, "chosen": difference.BOUND / 100}  # clipfit-tiny's logits are cosines times 100 at most
    measured = 0
    for (name, part, kind), row in table.items():
        for title, cell in row.items():
            if cell.startswith("no "):
                continue
            far, same, clear = CELL.fullmatch(cell).groups()
            measured += 1
            assert int(clear) <= int(same) <= 32, (name, part, kind, title)
            if kind in bounds:
                assert float(far) <= max(bounds[kind], bounds["fp32"]), (name, part, kind, title)
    assert measured > len(table) * 4


def test_every_refusal_has_its_sentence(page, table):
    numbers = {int(cell[3:]) for row in table.values() for cell in row.values() if cell.startswith("no ")}
    sentences = dict(re.findall(r"^(\d+)\. (.*)$", page, re.MULTILINE))
    assert {int(number) for number in sentences} == numbers
    for sentence in sentences.values():
        assert any(f"{name}" in sentence for name in FORMATS), sentence  # those that can are named


@pytest.mark.slow
def test_a_column_is_what_the_consumers_find_today(script, table, tmp_path):
    """Of a LoRA run, whose differences are read back too; in a process a cell."""
    column, _ = script["cells"]("LoRA", tmp_path)
    reasons: list[str] = []
    for row, cell in column.items():
        text, told = cell.text(reasons), table[row.cells]["LoRA"]
        assert text.startswith("no ") == told.startswith("no "), row
