"""The tables of `evaluate --retain` and `--drift`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich.console

from clipfit.measure.forgetting import Drift, Retained
from clipfit.report.evaluation import empty_table, judged, line, points, share

if TYPE_CHECKING:
    from clipfit.verbs.evaluate import Evaluation


def show(out: rich.console.Console, result: Evaluation) -> None:
    """A table a place; nothing where none was asked for."""
    for place in result.retain:
        _retained(out, place)
    if result.drift:
        _drifted(out, result.drift)


def _retained(out: rich.console.Console, place: Retained) -> None:
    line(out, f"retained of {place.data}: {len(place.classes)} classes, {place.rows[0].accuracy.n} images")
    table = empty_table()
    for name in ("α", "accuracy", "− zero-shot", "95%"):
        table.add_column(name, no_wrap=True)
    for row in place.rows:
        d = row.against_zero_shot
        beside = (judged(d), f"[{points(d.low)} {points(d.high)}]") if row.alpha else ("", "")
        table.add_row(_ratio(row.alpha), share(row.accuracy), *beside)
    out.print(table)
    _unread(out, place)


def _drifted(out: rich.console.Console, drift: Drift) -> None:
    line(out, f"drift on {drift.data}: {drift.n} images beside {len(drift.classes)} classes")
    table = empty_table()
    for name in ("α", "cosines moved\nby, mean", "95% by\nat most", "images' cosine\nwith before", "other best\nclass"):
        table.add_column(name, no_wrap=True)
    for row in drift.rows:
        table.add_row(
            _ratio(row.alpha), f"{row.mean_change:.4f}", f"{row.p95_change:.4f}", f"{row.image_cosine:.4f}",
            f"{row.best_changed:.1%}",
        )  # fmt: skip
    out.print(table)
    _unread(out, drift)


def _ratio(alpha: float) -> str:
    return f"{alpha:g}" if alpha else "0 zero-shot"


def _unread(out: rich.console.Console, place: Retained | Drift) -> None:
    if place.skipped:
        line(out, f"note: {place.data}: {len(place.skipped)} unreadable images were skipped")
