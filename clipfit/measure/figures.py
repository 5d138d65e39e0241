"""The figures of `evaluate` as functions of tables of predictions: no model is needed for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from clipfit.measure.calibration import Temperature
from clipfit.measure.metrics import Accuracy, Difference, harmonic_mean
from clipfit.measure.predictions import Predictions
from clipfit.measure.reliability import Certainty, certainty

PARTS = ("base", "new", "union")
# of one model: "union" always; "base" and "new" where they do not follow from it (see scoring.tables)
Tables = Mapping[str, Predictions]


@dataclass(frozen=True)
class AlphaResult:
    """Figures at one α. base: within the base label set; new: within the new one; union: within both together.

    agreement: the share of all images on which the union's prediction is that of zero-shot; needs no labels.
    against_zero_shot: part → accuracy minus that of zero-shot, of the parts that were measured.
    certainty: part → what its probabilities are worth, likewise.
    """

    alpha: float
    base: Accuracy | None
    new: Accuracy | None
    union: Accuracy | None
    agreement: float
    against_zero_shot: Mapping[str, Difference]
    certainty: Mapping[str, Certainty] = field(default_factory=dict)

    @property
    def harmonic_mean(self) -> float | None:
        return harmonic_mean(self.base.value, self.new.value) if self.base and self.new else None

    def as_json(self) -> dict[str, Any]:
        """One row of `evaluate --json`."""
        return {
            "alpha": self.alpha,
            "base": self._part("base", self.base),
            "new": self._part("new", self.new),
            "harmonic_mean": self.harmonic_mean,
            "union": self._part("union", self.union),
            "agreement_with_zero_shot": self.agreement,
            "against_zero_shot": {
                part: asdict(self.against_zero_shot[part]) if part in self.against_zero_shot else None
                for part in PARTS
            },
        }  # fmt: skip

    def _part(self, part: str, accuracy: Accuracy | None) -> dict[str, Any] | None:
        if accuracy is None:
            return None
        return {**accuracy.as_json(), **(self.certainty[part].as_json() if part in self.certainty else {})}


def figures(
    model: Tables,
    zero_shot: Tables,
    base: Sequence[str],
    new: Sequence[str],
    temperature: Temperature | None = None,
) -> AlphaResult:
    """What the tables of a model say, beside those of zero-shot CLIP for the same images.

    Args:
        temperature: of the run, for the table that it holds for.
    """
    parts, reference = parts_of(model, base, new), parts_of(zero_shot, base, new)
    accuracies = {part: table.accuracy() for part, table in parts.items()}
    return AlphaResult(
        model["union"].alpha,
        accuracies.get("base"),
        accuracies.get("new"),
        accuracies.get("union"),
        model["union"].agreement_with(zero_shot["union"]),
        {part: _difference(table, reference[part]) for part, table in parts.items()},
        {part: certainty(table, temperature) for part, table in parts.items()},
    )


def parts_of(tables: Tables, base: Sequence[str], new: Sequence[str]) -> dict[str, Predictions]:
    """The parts that have images; the union has them where there are images of new classes."""
    union = tables["union"]
    found = {
        "base": tables["base"] if "base" in tables else union.within(base),
        "new": tables["new"] if "new" in tables else union.within(new),
    }
    parts = {part: table for part, table in found.items() if table.ids}
    return {**parts, "union": union} if "new" in parts else parts


def _difference(table: Predictions, zero_shot: Predictions) -> Difference:
    if table.alpha == zero_shot.alpha:
        return Difference(0.0, 0.0, 0.0)  # a model against itself: there is nothing to be unsure of
    return table.gain_over(zero_shot)


@dataclass(frozen=True)
class Loss:
    """A class that an α knows less well than zero-shot CLIP does; fractions of 1."""

    name: str
    before: float
    after: float


def losses(row: AlphaResult, zero_shot: AlphaResult) -> list[Loss]:
    """The classes that lost, each within its part, the largest loss first."""
    pairs = [(row.base, zero_shot.base), (row.new, zero_shot.new)]
    found = [
        Loss(name, before.per_class[name][0] / n, right / n)
        for after, before in pairs
        if after and before
        for name, (right, n) in after.per_class.items()
        if right < before.per_class[name][0]
    ]
    return sorted(found, key=lambda loss: loss.after - loss.before)
