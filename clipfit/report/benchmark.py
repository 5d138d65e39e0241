"""What `benchmark` shows: the table of the mean, or of the only set, and where all of them are."""

from __future__ import annotations

import rich.box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clipfit.config.plan import MEAN
from clipfit.plans.figures import HM, Figure
from clipfit.plans.pages import columns_of, heading_of, in_rows, published
from clipfit.text import printable
from clipfit.verbs.benchmark import MARKDOWN, Benchmarked

MOST_COLUMNS = 6  # at 80 characters; beyond it of base, new and HM the last alone


def show(out: Console, result: Benchmarked) -> None:
    """A table, and a line on how far the plan is."""
    figures, tables = result.tables.figures(), result.tables
    name = MEAN if any(figure.set == MEAN for figure in figures) else figures[0].set if figures else ""
    shown = [figure for figure in figures if figure.set == name]
    if shown:
        every = columns = columns_of(tables, name)
        if len(columns) > MOST_COLUMNS and tables.halves:
            columns = [column for column in columns if column[1].endswith(HM)]
        title = f"{name} of {shown[0].sets} sets" if name == MEAN else name
        table = Table(title=_cell(title), title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)
        for k, heading in enumerate(("method", "α", *(heading_of(tables, *column) for column in columns))):
            table.add_column(_cell(heading), justify="right" if k else "left", no_wrap=k == 0, overflow="fold")
        for row, found in in_rows(shown, columns).items():
            table.add_row(_cell(row[0]), f"{row[1]:g}", *(_figure(f) for f in found))
        for called, cells in published(tables.plan, name, every).items():
            place_of = dict(zip(every, cells, strict=True))
            table.add_row(_cell(f"{called}, published"), "", *(place_of[column] for column in columns))
        out.print(table)
        out.print(f"in percent; * its difference to {tables.plan.reference} is more than chance", style="dim",
                  soft_wrap=True)  # fmt: skip
    left = result.cells - result.finished
    lines = [f"{result.finished} of {result.cells} cells are finished" + (f", {left} are left" if left else "")]
    lines += [f"all tables: {result.output / MARKDOWN}"] if figures else []
    for line in lines:
        out.print(printable(line), markup=False, soft_wrap=True)


def _figure(figure: Figure | None) -> str:
    if figure is None:
        return ""
    sure = "*" if figure.gain and figure.gain.verdict else " "
    return f"{100 * (figure.found.mean or 0.0):.1f}{sure}"


def _cell(text: str) -> str:
    return escape(printable(text))
