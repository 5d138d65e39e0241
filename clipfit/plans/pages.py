"""A plan's tables for people and for spreadsheets: table.md and table.csv."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence

from clipfit.config.plan import MEAN, Plan
from clipfit.measure.metrics import Estimate
from clipfit.plans.figures import Figure, Row, Tables

KEYS = ("set", "sets", "method", "alpha", "shots", "figure", "mean", "half_width", "n", "difference", "low", "high",
        "published")  # fmt: skip
Column = tuple[int | None, str]  # shots, and the name of a figure


def published(plan: Plan, name: str, columns: Sequence[Column]) -> dict[str, list[str]]:
    """The figures of papers on a set, by the name of their row: a cell a column, in percent as they are printed.

    A figure that the paper does not have is nan in the plan, and empty here.
    """
    decimals = _decimals(plan)
    found = {}
    for called, table in plan.published.items():
        values = table.figures.get(name)
        if values:
            cells = ["" if math.isnan(value) else f"{value:.{decimals}f}" for value in values[: len(columns)]]
            found[called] = cells + [""] * (len(columns) - len(cells))
    return found


def _decimals(plan: Plan) -> int:
    """As many as the published figure with most of them has: TOML does not tell 71.70 from 71.7."""
    rows = (figures for table in plan.published.values() for figures in table.figures.values())
    return max((len(f"{value:.6g}".partition(".")[2]) for row in rows for value in row), default=0)


def csv_of(tables: Tables) -> str:
    """A line a number, fractions of 1; papers' figures likewise, under their own names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, KEYS, lineterminator="\n")
    writer.writeheader()
    for figure in tables.figures():
        writer.writerow(figure.as_json())
    for name in (MEAN, *tables.plan.sets):
        columns = columns_of(tables, name)
        for called, table in tables.plan.published.items():
            for (shots, column), value in zip(columns, table.figures.get(name, ()), strict=False):
                if not math.isnan(value):
                    writer.writerow({"set": name, "method": called, "shots": shots, "figure": column,
                                     "published": f"{value / 100:.6g}"})  # fmt: skip
    return text.getvalue()


def columns_of(tables: Tables, name: str) -> list[Column]:
    """(shots, figure) of each column of a set's table."""
    figures = tables.columns(next(iter(tables.plan.sets)) if name == MEAN else name)
    return [(shots, figure) for shots in tables.shots for figure in figures]


def in_rows(figures: Iterable[Figure], columns: Sequence[Column]) -> dict[Row, list[Figure | None]]:
    """A set's figures by row: of each column one, or None where it is not there yet."""
    place = {(f.method, f.alpha, f.shots, f.figure): f for f in figures}
    rows = dict.fromkeys((method, alpha) for method, alpha, _, _ in place)
    return {row: [place.get((*row, *column)) for column in columns] for row in rows}


def markdown(tables: Tables, title: str, cells: int, finished: int) -> str:
    """A table a set, that of the mean first: accuracies, then differences to the reference, papers' figures between."""
    plan = tables.plan
    by_set: dict[str, list[Figure]] = {}
    for figure in tables.figures():
        by_set.setdefault(figure.set, []).append(figure)
    lines = [f"# {title}", "", f"{plan.model}, protocol {plan.protocol}. {finished} of {cells} cells are finished.", ""]
    for name, figures in by_set.items():
        heading = f"{name} of {figures[0].sets} sets" if name == MEAN else name
        lines += [f"## {heading}", "", *_table(tables, name, figures), ""]
    return "\n".join([*lines, "\n\n".join(_foot(plan))]) + "\n"


def _table(tables: Tables, name: str, figures: Sequence[Figure]) -> list[str]:
    plan, columns = tables.plan, columns_of(tables, name)
    rows = in_rows(figures, columns)
    lines = [
        _line(["method", "α", *(heading_of(tables, *column) for column in columns)]),
        "|---" * (len(columns) + 2) + "|",
    ]
    for row, found in rows.items():
        lines.append(_line([row[0], f"{row[1]:g}", *(percent(f.found) if f else "" for f in found)]))
    lines += [_line([f"*{called}*", "", *cells]) for called, cells in published(plan, name, columns).items()]
    gains = {row: found for row, found in rows.items() if any(f and f.gain for f in found)}
    if gains:
        lines += ["", f"Minus {plan.reference}:", "", *lines[:2]]
        for row, found in gains.items():
            lines.append(_line([row[0], f"{row[1]:g}", *(_gain(f) for f in found)]))
    return lines


def heading_of(tables: Tables, shots: int | None, figure: str) -> str:
    """What stands above a column."""
    number = f"{shots}-shot" if shots is not None and (len(tables.shots) > 1 or figure == "accuracy") else ""
    return f"{number} {'' if number and figure == 'accuracy' else figure}".strip()


def percent(value: Estimate) -> str:
    """Percent, ± half of the 95% interval."""
    if value.mean is None:
        return ""
    return f"{100 * value.mean:.1f}" + ("" if value.half_width is None else f" ± {100 * value.half_width:.1f}")


def _gain(figure: Figure | None) -> str:
    if figure is None or figure.gain is None:
        return ""
    gain = figure.gain
    text = f"{100 * gain.difference:+.1f} [{100 * gain.low:.1f}, {100 * gain.high:.1f}]"
    return f"**{text}**" if gain.verdict else text


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _foot(plan: Plan) -> list[str]:
    what = "episodes" if plan.protocol == "episodes" else "seeds"
    lines = [f"In percent; ± is half of Student's 95% interval over {what}. Bold: the 95% interval of the difference, "
             "in brackets, leaves 0 out."]  # fmt: skip
    if what == "seeds":
        lines.append("Seeds draw shots, order and crops, and ± is their chance alone; the test images are the same for "
                     "all. Differences are paired by seed and by image, and their intervals are of both.")  # fmt: skip
    if plan.protocol == "bng":
        lines.append("HM over several sets: of the mean base and the mean new accuracy.")
    return [*lines, *(f"*{name}*: as published, {table.source}." for name, table in plan.published.items())]
