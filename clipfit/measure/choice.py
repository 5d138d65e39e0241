"""The ratio α, from what adaptations on parts of the shots made of images and of classes left out.

Three findings on tasks with known answers (docs/alpha.md) are behind the rule:

- Accuracy over a few dozen left-out images is all steps: its best ratio is chance. The log-loss has no steps, but a few
  wrong answers that are given with certainty rule it, and it then stays near zero-shot. The *mean probability of the
  right class*, at the temperature that suits each ratio best, is smooth, bounded, and flat where nothing is known.
- Where both base and new classes count, the score is the harmonic mean of both.
- The adaptations saw fewer shots than the final one, and so understate what a high ratio wins: of ratios that are no
  worse than the best by half a standard error, paired image by image, the highest is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clipfit.measure.calibration import best_temperature
from clipfit.measure.folds import Scores
from clipfit.measure.metrics import wilson_interval

TOLERANCE = 0.5  # standard errors


@dataclass(frozen=True, eq=False)
class Curve:
    """Of one kind of folds, all of them pooled: every image counts the same. A ratios, n images.

    likely: (A, n) float64, the probability of the image's class at the temperature that suits the ratio best.
    right: (A, n) bool.
    """

    ratios: tuple[float, ...]
    temperatures: tuple[float, ...]
    likely: torch.Tensor
    right: torch.Tensor

    @property
    def images(self) -> int:
        return self.right.shape[1]

    def as_json(self) -> list[dict[str, float]]:
        """A row a ratio; the accuracy with Wilson's 95% interval."""
        rows = zip(
            self.ratios, self.right.sum(1).tolist(), self.likely.mean(1).tolist(), self.temperatures, strict=True
        )
        return [
            {"alpha": alpha, "n": self.images, "accuracy": right / self.images, "low": low, "high": high,
             "probability": likely, "temperature": temperature}
            for alpha, right, likely, temperature in rows
            for low, high in [wilson_interval(right, self.images)]
        ]  # fmt: skip


def curve_of(scores: Sequence[Scores], ratios: Sequence[float]) -> Curve:
    """The curve of folds of one kind, scored at these ratios."""
    temperatures, likely = [], []
    for a in range(len(ratios)):
        tables = [(fold.logits[a], fold.labels) for fold in scores]
        temperature = best_temperature(tables)
        temperatures.append(temperature)
        likely.append(torch.cat([(x.double() / temperature).softmax(1).gather(1, y[:, None])[:, 0] for x, y in tables]))
    right = torch.cat([fold.logits.argmax(2) == fold.labels for fold in scores], 1)
    return Curve(tuple(ratios), tuple(temperatures), torch.stack(likely), right)


def choose(curves: Sequence[Curve]) -> float:
    """The ratio, by one curve or by the harmonic mean of two; all at the same ratios."""
    means = torch.stack([curve.likely.mean(1) for curve in curves])  # (curves, A)
    score = len(curves) / (1 / means).sum(0)
    best = int(score.argmax())
    # by how much the score moves with each mean: the square of score / mean, shared between the curves
    slopes = (score[best] / means[:, best]) ** 2 / len(curves)
    variance = sum(
        slope**2 * (curve.likely[best] - curve.likely).var(1) / curve.images
        for slope, curve in zip(slopes, curves, strict=True)
    )
    tolerable = score >= score[best] - TOLERANCE * torch.as_tensor(variance).sqrt()
    return max(ratio for ratio, good in zip(curves[0].ratios, tolerable.tolist(), strict=True) if good)
