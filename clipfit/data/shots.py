"""Which of the labelled images are shots, and which are held out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from clipfit.data.layout import LabelledImages, Sample
from clipfit.errors import DataError


@dataclass(frozen=True)
class Selection:
    """The shots, and the base classes in order."""

    shots: tuple[Sample, ...]
    base: tuple[str, ...]


def select(
    images: LabelledImages, per_class: int | None, seed: int, usable: Callable[[Sample], bool] = lambda sample: True
) -> Selection:
    """K shots a class, drawn by the seed (None: all training images).

    Args:
        usable: asked of each image as it is drawn; one that is not is passed over, and the next one drawn.

    Raises:
        DataError: no training images, fewer than two classes, or a class with fewer than K usable images.
    """
    if not images.train:
        raise DataError("there are test images alone: expected images to train on, in train/<class>/.")
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
        by_class = {name: _draw(samples, per_class, generator, usable) for name, samples in by_class.items()}
    shots = tuple(sample for samples in by_class.values() for sample in samples)
    return Selection(shots, tuple(by_class))


def _draw(
    samples: Sequence[Sample], count: int, generator: torch.Generator, usable: Callable[[Sample], bool]
) -> list[Sample]:
    order = torch.randperm(len(samples), generator=generator).tolist()
    chosen = list(itertools.islice((i for i in order if usable(samples[i])), count))
    if len(chosen) < count:
        raise DataError(
            f"--shots {count} needs {count} readable images in every class, but {samples[0].label!r} has {len(chosen)}."
        )
    return [samples[i] for i in sorted(chosen)]
