"""Curves as data: accuracy over the ratio α, measured and on folds; losses over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_POINTS = 200


@dataclass(frozen=True)
class Point:
    """At one ratio: a share, and its 95% interval; none of a harmonic mean."""

    alpha: float
    value: float
    low: float | None = None
    high: float | None = None


def measured(document: Mapping[str, Any], part: str) -> list[Point]:
    """Of an evaluation (`evaluate --json`, or as it is kept): base, new, union, or harmonic_mean."""
    rows = [(row["alpha"], row.get(part)) for row in document["alphas"]]
    return [
        Point(alpha, found)
        if isinstance(found, float)
        else Point(alpha, found["accuracy"], found["low"], found["high"])
        for alpha, found in rows
        if found is not None
    ]


def of_folds(document: Mapping[str, Any], part: str) -> list[Point]:
    """Of folds.json: base or new; none where nothing was left out."""
    rows = document.get("curves", {}).get(part) or []
    return [Point(row["alpha"], row["accuracy"], row["low"], row["high"]) for row in rows]


@dataclass(frozen=True)
class LossCurve:
    """A loss by step; each value is the mean of `steps_a_point` steps, at their middle."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]
    steps_a_point: int


def losses(lines: Sequence[Mapping[str, Any]], most: int = MOST_POINTS) -> list[LossCurve]:
    """Of metrics.jsonl: every loss by name, and their weighted sum as `total` where there are several."""
    if not lines:
        return []
    names = list(lines[0]["losses"])
    series = {name: [float(line["losses"][name]) for line in lines] for name in names}
    if names != ["total"] and len(names) > 1:
        series["total"] = [float(line["total"]) for line in lines]
    size = -(-len(lines) // most)
    steps = [float(line["step"]) for line in lines]
    return [LossCurve(name, _means(steps, size), _means(values, size), size) for name, values in series.items()]


def _means(values: Sequence[float], size: int) -> tuple[float, ...]:
    pieces = [values[start : start + size] for start in range(0, len(values), size)]
    return tuple(sum(piece) / len(piece) for piece in pieces)
