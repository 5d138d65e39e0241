"""`evaluate`: base, new and union accuracy at each ratio α, zero-shot always beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clipfit.config import EvaluateConfig
from clipfit.data.images import ImageStore
from clipfit.ensemble import interpolate
from clipfit.errors import DataError
from clipfit.events import Progress, Silent
from clipfit.measure import held_out, scoring
from clipfit.measure.metrics import Accuracy, accuracy, harmonic_mean
from clipfit.model import devices
from clipfit.model.clip import Clip
from clipfit.runs.record import Run, open_run


@dataclass(frozen=True)
class AlphaResult:
    """Figures at one α. base: within the base label set; new: within the new one; union: within both together.

    agreement: the share of all images on which the union's prediction is that of zero-shot; needs no labels.
    """

    alpha: float
    base: Accuracy | None
    new: Accuracy | None
    union: Accuracy | None
    agreement: float

    @property
    def harmonic_mean(self) -> float | None:
        return harmonic_mean(self.base.value, self.new.value) if self.base and self.new else None

    def as_json(self) -> dict[str, Any]:
        """One row of `evaluate --json`."""
        part = lambda a: a.as_json() if a else None  # noqa: E731
        return {
            "alpha": self.alpha,
            "base": part(self.base),
            "new": part(self.new),
            "harmonic_mean": self.harmonic_mean,
            "union": part(self.union),
            "agreement_with_zero_shot": self.agreement,
        }


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. `held_out` False: on the shots themselves, no evidence of generalisation."""

    run: Path
    data: str
    method: str
    held_out: bool
    base_classes: tuple[str, ...]
    new_classes: tuple[str, ...]
    rows: tuple[AlphaResult, ...]
    notes: tuple[str, ...] = field(default=())
    skipped: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """The document of `evaluate --json`."""
        return {
            "run": str(self.run),
            "data": self.data,
            "method": self.method,
            "held_out": self.held_out,
            "base_classes": list(self.base_classes),
            "new_classes": list(self.new_classes),
            "alphas": [row.as_json() for row in self.rows],
            "notes": list(self.notes),
            "skipped": list(self.skipped),
        }


def evaluate(config: EvaluateConfig, progress: Progress | None = None) -> Evaluation:
    """Measure a run on held-out images.

    Raises:
        ClipfitError: see errors; the pre-trained weights are always needed, for zero-shot stands beside everything.
    """
    progress = progress or Silent()
    run = open_run(config.run)
    test = held_out.assemble(run, config)
    device = devices.resolve_device(config.device)
    progress.say(f"loading {run.source.model} on {device}")
    backbone = run.pretrained(device)
    backbone.precision = str(run.config["precision"]) if device.type == run.config["device"] else "fp32"
    pretrained = backbone.snapshot()
    finetuned = {name: tensor.to(device) for name, tensor in run.finetuned().items()}

    progress.say(f"decoding {len(test.samples)} images")
    images = ImageStore(test.samples, config.cache_bytes, backbone.geometry, config.skip_bad_images)
    if not len(images):
        raise DataError(f"no readable image is left of the {len(test.samples)} to evaluate on: replace broken images.")
    alphas = sorted({0.0, *(config.alphas if config.alphas is not None else (run.alpha,))})
    rows: list[AlphaResult] = []
    zero_shot: list[str] = []
    for alpha in alphas:
        progress.say(f"evaluating at α = {alpha:g}")
        backbone.load_state(interpolate(pretrained, finetuned, alpha))
        row, union_names = _measure(backbone, images, run, test.new, alpha, zero_shot, config.batch_size)
        zero_shot = zero_shot or union_names
        rows.append(row)
    data = str(config.data or run.config["shots"])
    return Evaluation(
        run.path, data, run.method, test.held_out, run.base, test.new, tuple(rows), test.notes, tuple(images.skipped)
    )


def _measure(
    backbone: Clip,
    images: ImageStore,
    run: Run,
    new: Sequence[str],
    alpha: float,
    zero_shot: list[str],
    batch_size: int,
) -> tuple[AlphaResult, list[str]]:
    labels = [sample.label for sample in images.samples]
    everything = range(len(labels))
    # edited images differ with the classes they are compared with; others are encoded once
    once = None if backbone.edits else scoring.image_embeddings(backbone, images, everything, batch_size)  # (n, D)

    def guesses(own: Sequence[int], names: Sequence[str]) -> list[str]:
        t, z = scoring.texts(backbone, names, run.template)
        if once is not None:
            return scoring.best_names(once[torch.tensor(own)], t, names)
        return scoring.best_names(scoring.image_embeddings(backbone, images, own, batch_size, z), t, names)

    def within(names: Sequence[str]) -> Accuracy | None:
        wanted = set(names)
        own = [i for i, label in enumerate(labels) if label in wanted]
        return accuracy(guesses(own, names), [labels[i] for i in own]) if own else None

    union = [*run.base, *new]
    union_names = guesses(everything, union)
    agreement = sum(a == b for a, b in zip(union_names, zero_shot or union_names, strict=True)) / len(union_names)
    new_accuracy = within(new)
    row = AlphaResult(
        alpha,
        base=within(run.base),
        new=new_accuracy,
        union=accuracy(union_names, labels) if new_accuracy else None,
        agreement=agreement,
    )
    return row, union_names
