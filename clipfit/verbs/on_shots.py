"""What the model makes of the shots themselves, before it is adapted and after."""

from __future__ import annotations

from dataclasses import dataclass

from clipfit.data.loaded import Shots
from clipfit.measure import metrics, scoring
from clipfit.model.clip import Clip
from clipfit.runs.record import RunRecord

NEAR_PERFECT = 0.98  # zero-shot accuracy


@dataclass(frozen=True)
class OnShots:
    """Accuracies on the shots themselves: no evidence of generalisation."""

    zero_shot_accuracy: float
    adapted_accuracy: float


def accuracy(clip: Clip, shots: Shots, record: RunRecord) -> float:
    """Share of the shots, seen whole, that the base classes' texts name rightly."""
    t, z = scoring.texts(clip, shots.base, record.all_templates)
    u = scoring.image_embeddings(clip, shots.images.views, range(len(shots)), batch_size=64, class_tokens=z)
    return metrics.accuracy(scoring.best_names(u, t, shots.base), [shots.base[label] for label in shots.labels]).value


def notes(zero_shot: float, shots: Shots, record: RunRecord) -> list[str]:
    """What one should know before adapting, where zero-shot accuracy on the shots (a share) is near an end."""
    low, _ = metrics.wilson_interval(round(zero_shot * len(shots)), len(shots))
    if low <= 1 / len(shots.base):
        near = f"near chance (1 of {len(shots.base)}): check that the class names say what is seen"
        ratio = "" if record.goal else "; if they do, the best α is likely near 1 (--alpha auto chooses it)"
        return [f"zero-shot names {zero_shot:.0%} of the shots rightly, {near}{ratio}"]
    if zero_shot >= NEAR_PERFECT:
        return [
            f"zero-shot names {zero_shot:.0%} of the shots rightly already: there is little to win, so measure on "
            "held-out images whether adapting is worth it"
        ]
    return []
