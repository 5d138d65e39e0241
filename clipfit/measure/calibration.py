"""The temperature of a run: what logits are divided by so that probabilities are as often right as they say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from clipfit.errors import ModelError
from clipfit.prompts import Templates
from clipfit.runs import files, manifest
from clipfit.runs.record import typed
from clipfit.runs.run import Run

FOLDS = "folds.json"


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


def temperature_of(run: Run) -> Temperature | None:
    """`temperature` in the run's folds.json, a Temperature's fields as JSON; None where it has none.

    Raises:
        ModelError: the file is damaged.
    """
    file = run.path / FOLDS
    if not file.is_file():
        return None
    if FOLDS in run.digests:
        manifest.verify(run.path, [FOLDS])
    found = files.read_json(file)
    document = found.get("temperature") if isinstance(found, dict) else None
    if document is None:
        return None
    temperature = typed(document, Temperature, file)
    if not 0 < temperature.value < float("inf"):
        raise ModelError(f"{file} is not as clipfit wrote it: a temperature of {temperature.value}.")
    return temperature
