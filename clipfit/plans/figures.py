"""The tables of a plan as data: means over seeds, differences paired by seed, what papers published."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clipfit.config.plan import MEAN, Plan
from clipfit.measure.metrics import Estimate, estimate, harmonic_mean, paired_difference
from clipfit.plans.cells import Cell, Result, in_episodes

HM = "HM"
Results = Mapping[Cell, Result]
Row = tuple[str, float]  # a method, at a ratio


@dataclass(frozen=True)
class Gain:
    """A figure minus that of the reference, paired by seed, with its 95% interval; fractions of 1.

    The interval holds two kinds of chance: of seeds (Student's, over the n differences) and of the test images, which
    are the same for every seed (Newcombe's of paired shares, see metrics.paired_difference; the mean over seeds of its
    distances). They are independent, so that their squares are added (MOVER: Zou and Donner, Statistics in Medicine
    27:1693–1702, 2008); in the same way those of several sets, and of base and new in an HM. Seeds alone would call a
    difference sure wherever three seeds happen to agree. Episodes draw their images anew, so that Student's has both.
    """

    difference: float
    low: float
    high: float
    n: int

    @property
    def verdict(self) -> str:
        """ "better" or "worse" where the interval leaves no doubt, else empty."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else ""


@dataclass(frozen=True)
class Figure:
    """One number of the tables: a row's, on a set or on the mean of all, at a number of shots, in a column.

    mean, half_width: fractions of 1, over n seeds or episodes, with half of Student's 95% interval.
    sets: over how many sets a mean is.
    """

    set: str
    method: str
    alpha: float
    shots: int | None
    figure: str
    found: Estimate
    gain: Gain | None
    sets: int = 1

    def as_json(self) -> dict[str, Any]:
        """A row of `benchmark --json` and of table.csv."""
        none = {"difference": None, "low": None, "high": None}
        gain = {key: value for key, value in asdict(self.gain).items() if key in none} if self.gain else none
        return {"set": self.set, "sets": self.sets, "method": self.method, "alpha": self.alpha, "shots": self.shots,
                "figure": self.figure, **asdict(self.found), **gain}  # fmt: skip


class Tables:
    """The figures of the cells that are finished."""

    def __init__(self, plan: Plan, results: Results):
        self.plan, self._results = plan, results
        self.shots: tuple[int | None, ...] = plan.shots or (None,)
        halves = {"bng": [""], "cdg": [f"{name} " for name in plan.targets]}.get(plan.protocol)
        self.halves = halves or []  # what stands before base, new and HM
        self._of_cell = {name: [*(f"{h}{part}" for h in self.halves for part in ("base", "new"))] or self._others(name)
                         for name in plan.sets}  # fmt: skip

    def _others(self, name: str) -> list[str]:
        return [name, *self.plan.targets] if self.plan.protocol == "dg" else ["accuracy"]

    def columns(self, name: str) -> list[str]:
        """The figures of a set."""
        if self.halves:
            return [f"{h}{part}" for h in self.halves for part in ("base", "new", HM)]
        return self._of_cell[name]

    @property
    def rows(self) -> list[Row]:
        """Methods in the plan's order, each at its ratios."""
        found = {(cell.method, alpha): None for cell, result in self._results.items() for alpha in result.predicted}
        order = list(self.plan.methods)
        return sorted(found, key=lambda row: (order.index(row[0]), row[1]))

    @functools.cache  # noqa: B019, for as long as the tables themselves
    def figures(self) -> tuple[Figure, ...]:
        """All of them: of the mean over the sets first, where there are several."""
        several = self.plan.protocol in ("fsl", "bng", "episodes") and len(self.plan.sets) > 1
        found = [list(self._of_sets(name, [name])) for name in self.plan.sets]
        means = list(self._of_sets(MEAN, list(self.plan.sets))) if several else []
        return (*means, *(figure for figures in found for figure in figures))

    def _of_sets(self, called: str, names: Sequence[str]) -> Iterator[Figure]:
        """A mean is over the sets that every row has finished at this number of shots."""
        for shots in self.shots:
            there = [name for name in names if all(self._values(row, [name], shots, f) for row in self.rows
                                                   for f in self._of_cell[name][:1])]  # fmt: skip
            there = there if len(names) > 1 else list(names)
            for row in self.rows if there else ():
                for figure in self.columns(there[0]):
                    values = self._values(row, there, shots, figure)
                    if values:
                        reference = self._reference(row)
                        gain = self.gain(row, reference, there, shots, figure) if reference else None
                        yield Figure(
                            called, *row, shots, figure, estimate(list(values.values())), gain, len(there)
                        )  # fmt: skip

    def _values(self, row: Row, names: Sequence[str], shots: int | None, figure: str) -> dict[int | None, float]:
        """By seed: of the seeds that are finished on all of these sets, the mean over them.

        An HM over several sets is that of the mean B and the mean N, as the papers have it (85.48 and 77.08: 81.06).
        """
        if figure.endswith(HM) and self.halves:
            base, new = (self._values(row, names, shots, figure[: -len(HM)] + part) for part in ("base", "new"))
            return {seed: harmonic_mean(base[seed], new[seed]) for seed in base if seed in new}
        of_sets = [self._of_set(row, name, shots, figure) for name in names]
        seeds = [seed for seed in of_sets[0] if all(seed in found for found in of_sets)]
        return {seed: statistics.fmean(found[seed] for found in of_sets) for seed in seeds}

    def _of_set(self, row: Row, name: str, shots: int | None, figure: str) -> dict[int | None, float]:
        return {seed: result.accuracy(row[1], figure) for seed, result in self._by_seed(row, name, shots)}

    def _by_seed(self, row: Row, name: str, shots: int | None) -> Iterator[tuple[int | None, Result]]:
        for cell, result in self._results.items():
            if (cell.method, cell.set) == (row[0], name) and cell.shots in (shots, None) and row[1] in result.predicted:
                yield cell.seed, result

    def _reference(self, row: Row) -> Row | None:
        """The reference at this ratio; where it has none such, at its only one."""
        mine = [other for other in self.rows if other[0] == self.plan.reference]
        found = next((other for other in mine if other[1] == row[1]), mine[0] if len(mine) == 1 else None)
        return None if row[0] == self.plan.reference else found

    def gain(self, row: Row, reference: Row, names: Sequence[str], shots: int | None, figure: str) -> Gain | None:
        """A row minus another on a set, or on the mean of several; None where no seed is finished for both."""
        values, others = (self._values(of, names, shots, figure) for of in (row, reference))
        pairs = {seed: others.get(seed, others.get(None)) for seed in values}
        gains = {seed: values[seed] - other for seed, other in pairs.items() if other is not None}
        if not gains:
            return None
        found = estimate(list(gains.values()))
        mean, of_seeds = found.mean or 0.0, found.half_width or 0.0
        if in_episodes(self.plan) and found.n > 1:
            return Gain(mean, mean - of_seeds, mean + of_seeds, found.n)
        below, above = self._of_images((row, reference), names, shots, figure, list(gains))
        return Gain(mean, mean - math.hypot(of_seeds, below), mean + math.hypot(of_seeds, above), found.n)

    def _of_images(
        self, pair: tuple[Row, Row], names: Sequence[str], shots: int | None, figure: str, seeds: Sequence[int | None]
    ) -> tuple[float, float]:
        """How far the images alone leave a difference open, below and above."""
        if figure.endswith(HM) and self.halves:
            parts = [figure[: -len(HM)] + part for part in ("base", "new")]
            b, n = (self._middle(pair, names, shots, part) for part in parts)
            slopes = [2 * (other / (b + n)) ** 2 if b + n else 0.0 for other in (n, b)]  # of 2BN / (B + N)
            sides = [self._of_images(pair, names, shots, part, seeds) for part in parts]
            weighted = [(slope * below, slope * above) for slope, (below, above) in zip(slopes, sides, strict=True)]
        else:
            found = [[self._newcombe(pair, name, shots, figure, seed) for seed in seeds] for name in names]
            means = [tuple(map(statistics.fmean, zip(*of_set, strict=True))) for of_set in found]
            weighted = [(below / len(names), above / len(names)) for below, above in means]
        return math.hypot(*(below for below, _ in weighted)), math.hypot(*(above for _, above in weighted))

    def _middle(self, pair: tuple[Row, Row], names: Sequence[str], shots: int | None, figure: str) -> float:
        """Between the row and the reference."""
        return statistics.fmean(statistics.fmean(self._values(row, names, shots, figure).values()) for row in pair)

    @functools.cache  # noqa: B019, for as long as the tables themselves
    def _newcombe(
        self, pair: tuple[Row, Row], name: str, shots: int | None, figure: str, seed: int | None
    ) -> tuple[float, float]:
        ours, theirs = (dict(self._by_seed(row, name, shots)) for row in pair)
        reference = theirs[seed] if seed in theirs else theirs[None]
        found = paired_difference(ours[seed].right(pair[0][1], figure), reference.right(pair[1][1], figure))
        return found.difference - found.low, found.high - found.difference

    def lines(self) -> list[dict[str, Any]]:
        """results.jsonl: a line a cell and ratio."""
        kind = "episode" if in_episodes(self.plan) else "seed"
        return [
            {"set": cell.set, "method": cell.method, "shots": cell.shots, kind: cell.seed, "alpha": alpha,
             "images": result.images,
             **{figure: {"accuracy": result.accuracy(alpha, figure), "n": len(result.labels[figure])}
                for figure in result.labels}}
            for cell, result in self._results.items() for alpha in sorted(result.predicted)
        ]  # fmt: skip
