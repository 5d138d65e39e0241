"""The temperature of a run: what logits are divided by so that probabilities are as often right as they say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from clipfit.errors import ModelError
from clipfit.runs import files, manifest
from clipfit.runs.record import typed
from clipfit.runs.run import Run

FOLDS = "folds.json"


@dataclass(frozen=True)
class Temperature:
    """Found on folds of the shots, and true of the very model, classes and template that it was found for."""

    value: float
    alpha: float
    classes: tuple[str, ...]
    template: str

    def holds_for(self, alpha: float, classes: Iterable[str], template: str) -> bool:
        """Whether it was found for this ratio, these classes in whatever order, and this template."""
        return (self.alpha, sorted(self.classes), self.template) == (alpha, sorted(classes), template)


def temperature_of(run: Run) -> Temperature | None:
    """`temperature` in the run's folds.json: {"value", "alpha", "classes", "template"}. None where it has none.

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
