"""What to expect of images and classes not seen, from those that adaptations on parts of the shots had not seen.

A forecast is no measurement. Its interval has to hold what as many *other* images will show: their own chance doubles
the variance, images of one class resemble one another, and the adaptations had fewer shots than the final one. So it is
Wilson's, one and a half times as wide; docs/alpha.md has how often it held.
"""

from __future__ import annotations

from dataclasses import dataclass

from clipfit.measure.choice import Curve
from clipfit.measure.metrics import wilson_interval
from clipfit.runs.record import FOLDS, typed
from clipfit.runs.run import Run

CONFIDENCE = 0.9
WIDENED = 1.5


@dataclass(frozen=True)
class Expected:
    """Accuracy among so many classes, with its 90% interval, and that of zero-shot CLIP; fractions of 1."""

    accuracy: float
    low: float
    high: float
    zero_shot: float
    classes: int


@dataclass(frozen=True)
class Forecast:
    """On new images of the trained classes, and on classes never trained on; None where the shots cannot tell."""

    base: Expected | None
    new: Expected | None


def expected(curve: Curve, alpha: float, classes: int) -> Expected:
    """At one ratio."""
    accuracy, zero_shot = (curve.right[curve.ratios.index(a)].double().mean().item() for a in (alpha, 0.0))
    low, high = wilson_interval(round(accuracy * curve.images), curve.images, CONFIDENCE)
    below, above = WIDENED * (accuracy - low), WIDENED * (high - accuracy)
    return Expected(accuracy, max(accuracy - below, 0.0), min(accuracy + above, 1.0), zero_shot, classes)


def forecast_of(run: Run) -> Forecast | None:
    """What the run's folds.json foretells; None where it has none. Raises ModelError for a damaged one."""
    document = run.folds.get("forecast")
    return None if document is None else typed(document, Forecast, run.path / FOLDS)
