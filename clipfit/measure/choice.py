"""The ratio α, from what adaptations on parts of the shots made of images and of classes left out.

Three findings on tasks with known answers (docs/alpha.md) are behind the rule:

- Accuracy over a few dozen left-out images is all steps: its best ratio is chance. The log-loss has no steps, but a few
  wrong answers that are given with certainty rule it, and it then stays near zero-shot. The *mean probability of the
  right class*, at the temperature that suits each ratio best, is smooth, bounded, and flat where nothing is known.
- Where both base and new classes count, the score is the harmonic mean of both.
- A best ratio is worth little by itself: where the curve is flat it is chance. Where the folds *show* that moving wins,
  by two standard errors over zero-shot, the highest ratio that is no worse than the best by half a standard error is
  taken, for they saw fewer shots than the final adaptation and understate what a high ratio wins. Where they do not, of
  the ratios that are no worse than the best by one standard error the one nearest to 1 − z² is taken, z being the
  accuracy of zero-shot CLIP on the same images: near 0 where it is nearly always right, for there is little to win, and
  near 1 where it is nearly always wrong, for there is nothing to lose. All errors are paired, image by image.
- A dozen images that all win a little do not show it: the next may lose all. So the win that must exceed two standard
  errors counts two images more that do (Agresti and Coull, The American Statistician 52:119–126, 1998, add as many
  failures to a proportion).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clipfit.measure.calibration import best_temperature
from clipfit.measure.folds import Scores
from clipfit.measure.metrics import wilson_interval

SHOWN, AS_HIGH, AS_SAFE = 2.0, 0.5, 1.0  # standard errors
UNSEEN = 2  # images that lose all, which could have been among those left out


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
    """The ratio, by one curve or by the harmonic mean of two; all at the same ratios, 0 among them."""
    ratios = curves[0].ratios
    means = torch.stack([curve.likely.mean(1) for curve in curves])  # (curves, A)
    score = len(curves) / (1 / means).sum(0)
    best = int(score.argmax())
    behind, error = score[best] - score, _errors(curves, means, score, best)

    def within(errors: float) -> list[float]:
        return [ratio for ratio, good in zip(ratios, (behind <= errors * error).tolist(), strict=True) if good]

    zero_shot = ratios.index(0.0)
    images = min(curve.images for curve in curves)
    if (behind[zero_shot] * images - UNSEEN) / (images + UNSEEN) > SHOWN * error[zero_shot]:
        return max(within(AS_HIGH))
    safe = 1 - curves[0].right[zero_shot].double().mean().item() ** 2
    return min(within(AS_SAFE), key=lambda ratio: abs(ratio - safe))


def _errors(curves: Sequence[Curve], means: torch.Tensor, score: torch.Tensor, best: int) -> torch.Tensor:
    """The standard error of how far each ratio's score is behind the best: (A,); to first order in the means. One image
    tells none: infinite."""
    if min(curve.images for curve in curves) < 2:
        return torch.full_like(score, torch.inf)
    slopes = (score[best] / means[:, best]) ** 2 / len(curves)  # of the score in each curve's mean
    gaps = ((curve.likely[best] - curve.likely).var(1) / curve.images for curve in curves)
    return torch.stack([slope**2 * gap for slope, gap in zip(slopes, gaps, strict=True)]).sum(0).sqrt()
