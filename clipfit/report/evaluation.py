"""The table of `evaluate`: every α beside zero-shot, within 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import rich.box
import rich.console
from rich.table import Table
from rich.text import Text

from clipfit.measure.figures import PARTS, AlphaResult
from clipfit.measure.metrics import Accuracy, Difference
from clipfit.measure.reliability import Certainty
from clipfit.text import printable

if TYPE_CHECKING:
    from clipfit.verbs.evaluate import Evaluation


def show(out: rich.console.Console, result: Evaluation, per_class: bool) -> None:
    """Tables and notes of one evaluation."""
    line(out, _title(result))
    out.print(_table(result))
    _show_certainty(out, result.rows)
    if per_class:
        line(out, "accuracy by class, %; base classes among base classes, new ones among new ones")
        out.print(_class_table(result))
    for note in result.notes:
        line(out, f"note: {note}")
    if result.skipped:
        line(out, f"note: {len(result.skipped)} unreadable images were skipped")


def line(out: rich.console.Console, text: str) -> None:
    """A line of text, as it is."""
    out.print(printable(text), markup=False, soft_wrap=True)


def _title(result: Evaluation) -> str:
    features = "" if result.features == "fp32" else f", features in {result.features}"
    if result.run is None:
        return f"{result.model} (zero-shot) on {result.data}{features}"
    where = "held-out images" if result.held_out else "the shots themselves"
    return f"{result.run} ({result.method}) on {where} of {result.data}{features}"


def _table(result: Evaluation) -> Table:
    """Three lines an α: accuracies with their intervals, the paired difference to zero-shot, and its interval."""
    table = empty_table()
    first = result.rows[0]
    parts = [part for part in PARTS if getattr(first, part)]
    mean = first.harmonic_mean is not None
    counts = {"base": len(result.base_classes), "new": len(result.new_classes)}
    table.add_column("α", no_wrap=True)
    for part in parts:
        classes = counts.get(part, sum(counts.values()))
        table.add_column(f"{part}\n{classes} classes\n{getattr(first, part).n} images", no_wrap=True)
    if mean:
        table.add_column("HM", justify="right", no_wrap=True)
    table.add_column("agrees\nwith 0", justify="right", no_wrap=True)
    for row in result.rows:
        table.add_row(
            "0 zero-shot" if row.alpha == 0 else f"{row.alpha:g}",
            *(share(getattr(row, part)) for part in parts),
            *([f"{row.harmonic_mean:.1%}"] if mean else ()),
            "" if row.alpha == 0 else f"{row.agreement:.1%}",
        )
        for line in _below(row, first, parts):
            table.add_row(*line, style="dim")
    return table


def _below(row: AlphaResult, zero_shot: AlphaResult, parts: Sequence[str]) -> list[list[str]]:
    """What stands under the accuracies of an α, by column."""
    lines = []
    accuracies: list[Accuracy] = [getattr(row, part) for part in parts]
    if any(accuracy.unbalanced for accuracy in accuracies):
        lines.append(["macro", *(f"{accuracy.macro:6.1%}" for accuracy in accuracies)])
    if row.alpha > 0:
        found = [row.against_zero_shot.get(part) for part in parts]
        mean, before = row.harmonic_mean, zero_shot.harmonic_mean
        gain = [] if mean is None or before is None else [f"{points(mean - before)} "]
        lines.append(["− zero-shot", *(judged(d) if d else "" for d in found), *gain])
        lines.append(["  95%", *(f"[{points(d.low)} {points(d.high)}]" if d else "" for d in found)])
    return lines


def share(accuracy: Accuracy) -> str:
    """In percent, with its interval."""
    low, high = accuracy.interval
    return f"{accuracy.value:6.1%} [{100 * low:.0f}–{100 * high:.0f}]"


def judged(difference: Difference) -> str:
    """The difference, and the word for it where its interval bears one out."""
    return f"{points(difference.difference):>5} {difference.verdict}".rstrip()


def points(difference: float) -> str:
    """Percentage points with their sign; no zero has one."""
    points = f"{100 * difference:+.1f}"
    return points[1:] if points[1:] == "0.0" else points.replace("-", "−")


def _show_certainty(out: rich.console.Console, rows: Sequence[AlphaResult]) -> None:
    """What the probabilities are worth: a line an α, all within 80 columns."""
    if not rows[0].certainty:
        return
    table = empty_table()
    table.add_column("α", no_wrap=True)
    parts = [part for part in PARTS if part in rows[0].certainty]
    for part in parts:
        table.add_column(f"{part}\n90%  75%  top5   ECE", no_wrap=True)
    for row in rows:
        cells = (_certain(row.certainty[part]) for part in parts)
        table.add_row("0 zero-shot" if row.alpha == 0 else f"{row.alpha:g}", *cells)
    line(out, "in %: right of the most certain 90% and 75% (100%: above), top-5, calibration")
    out.print(table)
    if any(c.calibrated for row in rows for c in row.certainty.values()):
        line(out, "* at the temperature that adapt found")


def _certain(certainty: Certainty) -> str:
    _, *covered = certainty.coverage
    shares = "  ".join(f"{100 * c.accuracy:3.0f}" for c in covered)
    top5 = " –" if certainty.top5 is None else f"{100 * certainty.top5:4.0f}"
    return f"{shares}  {top5:4}  {100 * certainty.calibration_error:4.1f}{'*' if certainty.calibrated else ''}"


def _class_table(result: Evaluation) -> Table:
    table = empty_table()
    table.add_column("class", overflow="fold", min_width=16)
    for row in result.rows:
        table.add_column(f"{row.alpha:g}", justify="right", no_wrap=True)
    table.add_column("images", justify="right")
    for part in ("base", "new"):
        measured: list[Accuracy] = [getattr(row, part) for row in result.rows]
        for name, (_, n) in (measured[0].per_class if measured[0] else {}).items():
            cells = [f"{100 * accuracy.per_class[name][0] / n:.0f}" for accuracy in measured]
            shown = printable(name if part == "base" else f"{name} (new)")
            table.add_row(Text(shown), *cells, str(n))
    return table


def empty_table() -> Table:
    """Without columns yet."""
    return Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
