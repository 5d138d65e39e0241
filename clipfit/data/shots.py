"""Which of the labelled images are shots, and which are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clipfit.data.layout import LabelledImages, Sample
from clipfit.errors import DataError


@dataclass(frozen=True)
class Selection:
    """The shots, and the base classes in order."""

    shots: tuple[Sample, ...]
    base: tuple[str, ...]


def select(images: LabelledImages, per_class: int | None, seed: int) -> Selection:
    """K shots a class, drawn by the seed (None: all training images).

    Raises:
        DataError: fewer than two classes, or a class with fewer than K images.
    """
    by_class: dict[str, list[Sample]] = {name: [] for name in images.names.values()}
    for sample in images.train:
        by_class[sample.label].append(sample)
    by_class = {name: samples for name, samples in by_class.items() if samples}
    if len(by_class) < 2:
        raise DataError(f"at least two classes are needed to tell apart; found only {next(iter(by_class))!r}.")
    if per_class is not None:
        short = {name: len(samples) for name, samples in by_class.items() if len(samples) < per_class}
        if short:
            listed = ", ".join(f"{name!r} has {n}" for name, n in short.items())
            raise DataError(f"--shots {per_class} needs {per_class} images in every class, but {listed}.")
        generator = torch.Generator().manual_seed(seed)
        by_class = {name: _draw(samples, per_class, generator) for name, samples in by_class.items()}
    shots = tuple(sample for samples in by_class.values() for sample in samples)
    return Selection(shots, tuple(by_class))


def _draw(samples: Sequence[Sample], count: int, generator: torch.Generator) -> list[Sample]:
    chosen = torch.randperm(len(samples), generator=generator)[:count].sort().values
    return [samples[i] for i in chosen.tolist()]
