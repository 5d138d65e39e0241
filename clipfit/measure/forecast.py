"""What to expect of images and classes not seen, from those that adaptations on parts of the shots had not seen."""

from __future__ import annotations

from dataclasses import dataclass

from clipfit.measure.calibration import FOLDS, folds_of_run
from clipfit.measure.choice import Curve
from clipfit.measure.metrics import wilson_interval
from clipfit.runs.record import typed
from clipfit.runs.run import Run

CONFIDENCE = 0.9


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
    at, zero = curve.ratios.index(alpha), curve.ratios.index(0.0)
    n, right = curve.images, int(curve.right[at].sum())
    low, high = wilson_interval(right // 2, max(n // 2, 1), CONFIDENCE)
    return Expected(right / n, low, high, curve.right[zero].double().mean().item(), classes)


def forecast_of(run: Run) -> Forecast | None:
    """What the run's folds.json foretells; None where it has none. Raises ModelError for a damaged one."""
    document = folds_of_run(run).get("forecast")
    return None if document is None else typed(document, Forecast, run.path / FOLDS)
