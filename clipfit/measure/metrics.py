"""Figures and how sure they are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers, overall and by class. `per_class`: class name → (right, images)."""

    right: int
    n: int
    per_class: dict[str, tuple[int, int]]

    @property
    def value(self) -> float:
        return self.right / self.n

    def as_json(self) -> dict[str, object]:
        """Fractions of 1, with the Wilson 95% interval of the whole."""
        low, high = wilson_interval(self.right, self.n)
        return {
            "accuracy": self.value,
            "n": self.n,
            "interval": [low, high],
            "per_class": {name: {"accuracy": r / n, "n": n} for name, (r, n) in self.per_class.items()},
        }


def accuracy(predicted: Sequence[str], actual: Sequence[str]) -> Accuracy:
    """Share of predictions that name the right class; classes in order of first appearance."""
    per_class: dict[str, tuple[int, int]] = {}
    for guess, truth in zip(predicted, actual, strict=True):
        right, n = per_class.get(truth, (0, 0))
        per_class[truth] = (right + (guess == truth), n + 1)
    return Accuracy(sum(r for r, _ in per_class.values()), len(actual), per_class)


def harmonic_mean(base: float, new: float) -> float:
    """HM = 2BN / (B + N), the base-to-new figure; 0 when both are."""
    return 2 * base * new / (base + new) if base + new > 0 else 0.0


def wilson_interval(right: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927), 95% by default.

    It stays inside [0, 1] and is honest for small n and proportions near 0 or 1, where ±1.96·σ is not.
    """
    p, zz = right / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    low = 0.0 if right == 0 else max(0.0, centre - half)  # exact at the ends, where rounding leaves 1e-19
    high = 1.0 if right == n else min(1.0, centre + half)
    return low, high


@dataclass(frozen=True)
class Estimate:
    """A mean and half of its 95% interval; None where there are too few values for either."""

    mean: float | None
    half_width: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean, with Student's t interval of n − 1 degrees of freedom: 1.96·σ is too narrow for few values."""
    from scipy.stats import t  # takes a while to import

    n = len(values)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return Estimate(statistics.mean(values) if n else None, half, n)
