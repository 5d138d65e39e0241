"""What the shots alone say, before any image is held out: the ratio to take, how sure its probabilities are, and the
accuracy to expect on images and on classes not seen."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clipfit import folding
from clipfit.data.images import ImageStore
from clipfit.ensemble import State
from clipfit.events import Progress
from clipfit.folding import Subject
from clipfit.measure.calibration import Temperature
from clipfit.measure.choice import Curve, choose, curve_of
from clipfit.measure.folds import CLASSES, IMAGES, RATIOS, Scores, folds_of
from clipfit.measure.forecast import Forecast, expected
from clipfit.training.saving import Saving

FALLBACK = 0.5  # the papers' ratio, where there is nothing to choose by


@dataclass(frozen=True)
class Outlook:
    """goal: what α was chosen for; None: it was given. images: "val" or "folds", where the base figures are from."""

    alpha: float
    goal: str | None
    images: str | None
    base: Curve | None
    new: Curve | None
    forecast: Forecast
    temperature: Temperature | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """folds.json."""
        curves = {"base": self.base, "new": self.new}
        return {
            "alpha": self.alpha,
            "goal": self.goal,
            "images": self.images,
            "curves": {part: curve.as_json() if curve else None for part, curve in curves.items()},
            "forecast": asdict(self.forecast),
            "temperature": asdict(self.temperature) if self.temperature else None,
            "notes": list(self.notes),
        }


def look(
    subject: Subject,
    contents: Sequence[Hashable],
    finetuned: State,
    val: ImageStore | None,
    alpha: float | None,
    goal: str | None,
    progress: Progress,
    saving: Saving | None,
) -> Outlook:
    """Choose the ratio, or take the one given, and say what to expect at it.

    Images of a val part take the place of left-out shots: they are scored with the adapted model itself.

    Args:
        contents: of the shots; those of equal content stay together. val: images of the trained classes, cut to size.
        alpha: None: it is chosen. goal: "base", "new" or "both"; None: both, as far as there are figures of both.
    """
    ratios = tuple(sorted({*RATIOS, *(() if alpha is None else (alpha,))}))
    folds = [f for f in folds_of(subject.labels, contents, subject.adaptation.seed) if val is None or f.kind == CLASSES]
    scores = folding.carry_out(subject, folds, ratios, progress, saving)
    of_kind = {kind: [s for f, s in zip(folds, scores, strict=True) if f.kind == kind] for kind in (IMAGES, CLASSES)}
    if val is not None:
        of_kind[IMAGES] = [_of_val(subject, finetuned, val, ratios)]
    base, new = (curve_of(of_kind[kind], ratios) if of_kind[kind] else None for kind in (IMAGES, CLASSES))
    goal_found = (goal or ("both" if new else "base")) if alpha is None else None
    notes = (*_on_val(val), *_notes(base, new, alpha is None, len(subject.names)))
    if alpha is None:
        counting = [curve for curve, part in ((base, "base"), (new, "new")) if curve and goal_found in (part, "both")]
        curves = counting or [curve for curve in (base, new) if curve]  # with one shot a class, the other kind tells
        alpha = choose(curves) if curves else FALLBACK
    names, template = tuple(subject.names), subject.adaptation.recipe.template
    listed = subject.adaptation.listed
    at = ratios.index(alpha)
    return Outlook(
        alpha,
        goal_found,
        None if base is None else "folds" if val is None else "val",
        base,
        new,
        Forecast(
            expected(base, alpha, len(names)) if base else None,
            expected(new, alpha, len(names) // 2) if new else None,
        ),
        Temperature(base.temperatures[at], alpha, names, template, listed) if base else None,
        notes,
    )


def _of_val(subject: Subject, finetuned: State, val: ImageStore, ratios: Sequence[float]) -> Scores:
    labels = [subject.names.index(sample.label) for sample in val.samples]
    return folding.score(subject, finetuned, val, range(len(val)), labels, subject.names, ratios)


def _on_val(val: ImageStore | None) -> list[str]:
    if val is None:
        return []
    unread = f"; {len(val.skipped)} could not be read" if val.skipped else ""
    return [f"{len(val)} images of the val part stand for new images of these classes{unread}"]


def _notes(base: Curve | None, new: Curve | None, choosing: bool, classes: int) -> tuple[str, ...]:
    if base is None and new is None:
        nothing = f"one shot a class and {classes} classes leave nothing to choose α by: it is {FALLBACK:g}"
        return (nothing,) if choosing else ()
    said = []
    if base is None:
        said.append("with one shot a class no accuracy on new images of these classes can be foretold")
    if new is None:
        said.append(f"{classes} classes are too few to leave some out: nothing is foretold of classes not trained on")
    return tuple(said)
