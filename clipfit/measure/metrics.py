"""Figures and how sure they are."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers, overall and by class. `per_class`: class name → (right, images), images ≥ 1."""

    right: int
    n: int
    per_class: dict[str, tuple[int, int]]

    @property
    def value(self) -> float:
        """Over images ("micro"): a class counts as much as it has images."""
        return self.right / self.n

    @property
    def macro(self) -> float:
        """The mean of the classes' accuracies: every class counts the same."""
        return statistics.fmean(right / n for right, n in self.per_class.values())

    @property
    def unbalanced(self) -> bool:
        """Whether a class has at least twice the images of another, so that `value` can hide what classes lose."""
        counts = [n for _, n in self.per_class.values()]
        return max(counts) >= 2 * min(counts)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of `value`."""
        return wilson_interval(self.right, self.n)

    def as_json(self) -> dict[str, object]:
        """Fractions of 1."""
        low, high = self.interval
        return {
            "accuracy": self.value,
            "n": self.n,
            "low": low,
            "high": high,
            "macro": self.macro,
            "per_class": {name: {"accuracy": r / n, "n": n} for name, (r, n) in self.per_class.items()},
        }


def accuracy(predicted: Sequence[str], actual: Sequence[str]) -> Accuracy:
    """Share of predictions that name the right class; classes in order of first appearance.

    Raises:
        ValueError: there are none, or not as many of one as of the other.
    """
    if not actual:
        raise ValueError("there is no accuracy of no images")
    per_class: dict[str, tuple[int, int]] = {}
    for guess, truth in zip(predicted, actual, strict=True):
        right, n = per_class.get(truth, (0, 0))
        per_class[truth] = (right + (guess == truth), n + 1)
    return Accuracy(sum(r for r, _ in per_class.values()), len(actual), per_class)


def confusion(predicted: Sequence[str], actual: Sequence[str]) -> Counter[tuple[str, str]]:
    """How many images of a class were given a name: (class, name) → count; pairs that never occur count 0."""
    return Counter(zip(actual, predicted, strict=True))


def harmonic_mean(base: float, new: float) -> float:
    """HM = 2BN / (B + N), the base-to-new figure; 0 when both are."""
    return 2 * base * new / (base + new) if base + new > 0 else 0.0


def wilson_interval(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927).

    It stays inside [0, 1] and is honest for small n and proportions near 0 or 1, where ±1.96·σ is not.
    """
    z, share = statistics.NormalDist().inv_cdf((1 + confidence) / 2), right / n  # scipy has it, and takes 2 s to import
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return (middle - half if right else 0.0), (middle + half if right < n else 1.0)


@dataclass(frozen=True)
class Difference:
    """One accuracy minus another on the same images, with its 95% interval; fractions of 1.

    mcnemar_p: McNemar's exact test that none is better: how often chance alone would part the images that only one of
    the two has right so unevenly.
    """

    difference: float
    low: float
    high: float
    mcnemar_p: float = 1.0

    @property
    def verdict(self) -> str:
        """ "better" or "worse" where the interval leaves no doubt, else empty."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else ""


def paired_difference(ours: Sequence[bool], theirs: Sequence[bool]) -> Difference:
    """The share of right answers in `ours` minus that in `theirs`; item i of both is the same image.

    Newcombe's square-and-add interval for paired proportions (Statistics in Medicine 17:2635–2650, 1998, method 10):
    the Wilson intervals of both shares, joined with the correlation φ of the two answers. It is a closed form, covers
    the true difference 95 times in 100 or a little more often (where few images change sides), and keeps a width
    where none did: there the usual ±1.96·σ and the bootstrap would shrink to a point.

    Two images that both change sides the same way would leave 0 outside it, though a coin does as much every other
    time. So it is extended to 0 where McNemar's mid-p test (Fagerland, Lydersen and Laake, BMC Medical Research
    Methodology 13:91, 2013) does not reject at 5 %: fewer than five changes never show a difference.
    """
    from scipy.stats import binom, binomtest  # takes a while to import

    n = len(ours)
    if not n:
        raise ValueError("there is no difference on no images")
    both = sum(a and b for a, b in zip(ours, theirs, strict=True))
    right_a, right_b = sum(ours), sum(theirs)
    a, b = right_a / n, right_b / n
    low_a, high_a = wilson_interval(right_a, n)
    low_b, high_b = wilson_interval(right_b, n)
    # 2×2 counts: both right, only ours, only theirs, none; φ with the continuity correction of the paper's section 2
    excess = both * (n - right_a - right_b + both) - (right_a - both) * (right_b - both)
    corrected = max(excess - n / 2, 0) if excess > 0 else excess
    spread = right_a * (n - right_a) * right_b * (n - right_b)
    phi = corrected / math.sqrt(spread) if spread else 0.0
    below = _joined(a - low_a, high_b - b, phi)
    above = _joined(high_a - a, b - low_b, phi)
    low, high = a - b - below, a - b + above
    gained, changed = right_a - both, right_a + right_b - 2 * both
    p = float(binomtest(gained, changed).pvalue) if changed else 1.0
    if changed and p - binom.pmf(gained, changed, 0.5) > 0.05:
        low, high = min(low, 0.0), max(high, 0.0)
    return Difference(a - b, low, high, p)


def _joined(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))


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
