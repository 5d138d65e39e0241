"""Which of the labelled images are shots."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from clipfit.data.layout import LabelledImages, Sample
from clipfit.data.names import shortened
from clipfit.errors import DataError

# from here on a note warns: every image weighs the same in the loss, so a class of twice the images pulls twice as hard
UNBALANCED = 2


@dataclass(frozen=True)
class Selection:
    """The shots, and the base classes in order. `notes`: sentences for the user."""

    shots: tuple[Sample, ...]
    base: tuple[str, ...]
    notes: tuple[str, ...] = ()


def select(
    images: LabelledImages,
    per_class: int | None,
    seed: int,
    usable: Callable[[Sample], bool] = lambda sample: True,
    balanced: bool = False,
) -> Selection:
    """Up to K shots a class, drawn by the seed (None: all training images).

    Args:
        usable: asked of each image as it is drawn; one that is not is passed over, and the next one drawn.
        balanced: classes of unequal size will be balanced in training, so that no note need warn of them.

    Raises:
        DataError: no training images, or fewer than two classes.
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
        generator = torch.Generator().manual_seed(seed)
        by_class = {name: _draw(samples, per_class, generator, usable) for name, samples in by_class.items()}
    counts = {name: len(samples) for name, samples in by_class.items()}
    notes = [*_fewer(counts, per_class), *([] if balanced else _unbalanced(counts))]
    shots = tuple(sample for samples in by_class.values() for sample in samples)
    return Selection(shots, tuple(by_class), tuple(notes))


def _draw(
    samples: Sequence[Sample], most: int, generator: torch.Generator, usable: Callable[[Sample], bool]
) -> list[Sample]:
    order = torch.randperm(len(samples), generator=generator).tolist()
    chosen = itertools.islice((i for i in order if usable(samples[i])), most)
    return [samples[i] for i in sorted(chosen)]


def _fewer(counts: Mapping[str, int], per_class: int | None) -> list[str]:
    fewer = [f"{name!r} {count}" for name, count in counts.items() if count < (per_class or 0)]
    if not fewer:
        return []
    classes = "1 class has" if len(fewer) == 1 else f"{len(fewer)} classes have"
    return [f"{classes} fewer than {per_class} images, so that every one is a shot: {shortened(fewer)}"]


def _unbalanced(counts: Mapping[str, int]) -> list[str]:
    smallest, largest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[largest] < UNBALANCED * counts[smallest]:
        return []
    return [
        f"{largest!r} has {counts[largest]} images and {smallest!r} {counts[smallest]}: training goes by the larger "
        "classes; --balance draws as many of each"
    ]
