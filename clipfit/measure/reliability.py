"""How sure a table of predictions is, and whether rightly: what `evaluate` says of it, and curves that can be drawn.

The probability of an image is that of the name it is taken for: the largest of softmax(logits / temperature). It is
computed in float64: in float32 many are 1 exactly, and nothing would say which of them are the most certain.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from clipfit.measure.calibration import Temperature
from clipfit.measure.predictions import Predictions

BINS = 15
COVERAGES = (1.0, 0.9, 0.75)
FEWEST_FOR_TOP5 = 10  # among fewer names, to be among the best five says little
ROWS_AT_ONCE = 4096  # of float64; the table may have a million


@dataclass(frozen=True)
class Bin:
    """The n images whose probability lies in (low, high]: their mean probability, and the share that is right."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Covered:
    """The n most certain images: a share `coverage` of all, or the least above it that whole images make.

    accuracy: the share of them that is right; of equally certain ones at the border each counts as its part.
    least_probability: that of the last of them: what `predict --abstain-below` would be given.
    """

    coverage: float
    n: int
    accuracy: float
    least_probability: float


@dataclass(frozen=True, eq=False)
class Reliability:
    """Images of known label by how sure the table is of them: (n,) float64, n ≥ 1.

    confidence: the probability of what an image is taken for. right: 1 where that is its label, else 0.
    """

    confidence: torch.Tensor
    right: torch.Tensor

    @classmethod
    def of(cls, table: Predictions, temperature: float = 1.0) -> Reliability:
        """Raises ValueError where no label is known."""
        known = [i for i, label in enumerate(table.labels) if label is not None]
        if not known:
            raise ValueError("there is no reliability of no images")
        parts = [(rows.double() / temperature).softmax(1).amax(1) for rows in table.logits.split(ROWS_AT_ONCE)]
        right = [name == label for name, label in zip(table.names, table.labels, strict=True)]
        return cls(torch.cat(parts)[known], torch.tensor(right, dtype=torch.float64)[known])

    # ---- calibration

    def bins(self, count: int = BINS) -> list[Bin]:
        """Bins of equal width, from the least probability up; those without images are left out."""
        number = self._bin(count)
        return [
            Bin(b / count, (b + 1) / count, int(own.sum()), float(self.confidence[own].mean()),
                float(self.right[own].mean()))
            for b in range(count)
            if (own := number == b).any()
        ]  # fmt: skip

    def calibration_error(self, count: int = BINS) -> float:
        """ECE = Σ_b n_b/n · |accuracy_b − confidence_b| (Naeini, Cooper and Hauskrecht, AAAI 2015).

        15 bins of equal width, as in Guo et al. (ICML 2017) and all that is compared with it. Bins of equal mass are
        less biased where images abound (Nixon et al., CVPR workshops 2019); but of 150 images each would have ten, and
        chance alone would show an error of several points. Of a model that is mostly sure, bins of equal width have
        most images in the last.
        """
        return sum(b.n * abs(b.accuracy - b.confidence) for b in self.bins(count)) / len(self.right)

    def error_by_chance(self, count: int = BINS) -> float:
        """The mean of `calibration_error` if each image were right with exactly its probability p.

        A bin's part is E|Σ(y − p)|/n: by the normal law √(2/π · Σp(1−p)), and never more than Σ2p(1−p), the sum of
        the images' own, which is exact for one image and near it where p is close to 1.
        """
        variance = torch.zeros(count, dtype=torch.float64)
        variance.index_add_(0, self._bin(count), self.confidence * (1 - self.confidence))
        return float(torch.minimum((2 / math.pi * variance).sqrt(), 2 * variance).sum()) / len(self.right)

    def _bin(self, count: int) -> torch.Tensor:
        return (self.confidence * count).ceil().long().sub(1).clamp(0, count - 1)

    # ---- coverage

    def curve(self) -> list[Covered]:
        """What is right of the most certain images, at every probability that occurs, the largest first."""
        levels, counts, hits = self._levels()
        kept = counts.cumsum(0).tolist()
        rows = zip(kept, hits.cumsum(0).tolist(), levels.tolist(), strict=True)
        return [Covered(k / kept[-1], k, right / k, p) for k, right, p in rows]

    def at(self, coverage: float) -> Covered:
        """What is right of the most certain images, as many as are at least this share of all."""
        levels, counts, hits = self._levels()
        kept = counts.cumsum(0)
        k = max(1, math.ceil(coverage * len(self.right) - 1e-9))
        border = int(torch.searchsorted(kept, k))
        beyond = int(kept[border]) - k
        right = float(hits[: border + 1].sum() - hits[border] * beyond / counts[border])
        return Covered(coverage, k, right / k, float(levels[border]))

    def _levels(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The probabilities that occur, falling; how many images have each; how many of those are right."""
        levels, place, counts = torch.unique(self.confidence, return_inverse=True, return_counts=True)
        hits = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, place, self.right)
        return levels.flip(0), counts.flip(0), hits.flip(0)


@dataclass(frozen=True)
class Certainty:
    """What one table's probabilities are worth.

    top5: the share of images whose label is among the five best names; None where there are fewer than ten.
    calibrated: whether they are at a temperature found for this very ratio, these classes and these templates.
    error_by_chance: the calibration error that probabilities without fault would show on as many images.
    """

    top5: float | None
    temperature: float
    calibrated: bool
    calibration_error: float
    error_by_chance: float
    coverage: tuple[Covered, ...]

    def as_json(self) -> dict[str, Any]:
        """The keys that a part of `evaluate --json` has of them."""
        return {
            "top5": self.top5,
            "temperature": self.temperature,
            "calibrated": self.calibrated,
            "calibration_error": self.calibration_error,
            "calibration_error_by_chance": self.error_by_chance,
            "coverage": [asdict(covered) for covered in self.coverage],
        }


def certainty(table: Predictions, found: Temperature | None = None) -> Certainty:
    """At the temperature that was found, where it holds for this table, else at 1.

    Raises:
        ValueError: no label is known.
    """
    templates = table.templates or (table.template,)
    holds = found is not None and found.holds_for(table.alpha, table.candidates, templates)
    temperature = found.value if found is not None and holds else 1.0
    reliability = Reliability.of(table, temperature)
    return Certainty(
        table.top_accuracy(5) if len(table.candidates) >= FEWEST_FOR_TOP5 else None,
        temperature,
        holds,
        reliability.calibration_error(),
        reliability.error_by_chance(),
        tuple(reliability.at(coverage) for coverage in COVERAGES),
    )
