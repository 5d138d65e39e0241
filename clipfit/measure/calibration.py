"""The temperature of a run: what logits are divided by so that probabilities are as often right as they say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from clipfit.errors import ModelError
from clipfit.prompts import Templates
from clipfit.runs.record import FOLDS, typed
from clipfit.runs.run import Run


@dataclass(frozen=True)
class Temperature:
    """Found on folds of the shots, and true of the very model, classes and templates that it was found for.

    templates: None stands for `template` alone.
    """

    value: float
    alpha: float
    classes: tuple[str, ...]
    template: str
    templates: Templates | None = None

    def holds_for(self, alpha: float, classes: Iterable[str], templates: Templates) -> bool:
        """Whether it was found for this ratio, these classes in whatever order, and this very list of templates."""
        found_for = self.templates or (self.template,)
        return (self.alpha, sorted(self.classes), found_for) == (alpha, sorted(classes), templates)


def best_temperature(tables: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """What makes the labels of all tables together likeliest where logits are divided by it (arXiv 1706.04599).

    With a prior: log T is normal around 0, of standard deviation 1, and so counts as much as about one image. Without
    it, images that are all named rightly would make every probability 1.

    Args:
        tables: logits (n, C) and labels (n,) int64; n and C may differ between tables.
    """
    from scipy.optimize import minimize_scalar  # takes a while to import

    doubles = [(logits.double(), labels) for logits, labels in tables]

    def badness(log_temperature: float) -> float:
        parts = (
            torch.nn.functional.cross_entropy(logits / math.exp(log_temperature), labels, reduction="sum")
            for logits, labels in doubles
        )
        return sum(part.item() for part in parts) + log_temperature**2 / 2

    found = minimize_scalar(badness, bounds=(math.log(0.05), math.log(20)), method="bounded", options={"xatol": 1e-4})
    return math.exp(float(found.x))


def temperature_of(run: Run) -> Temperature | None:
    """`temperature` in the run's folds.json, a Temperature's fields as JSON; None where it has none.

    Raises:
        ModelError: the file is damaged.
    """
    document = run.folds.get("temperature")
    if document is None:
        return None
    temperature = typed(document, Temperature, run.path / FOLDS)
    if not 0 < temperature.value < float("inf"):
        raise ModelError(f"{run.path / FOLDS} is not as clipfit wrote it: a temperature of {temperature.value}.")
    return temperature
