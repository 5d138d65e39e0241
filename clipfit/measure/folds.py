"""Folds: adaptations on parts of the shots, and what they make of the images and the classes that were left out.

Two kinds answer two questions, in one go. *Images* left out of every class say what is gained on the trained classes;
whole *classes* left out say what becomes of classes that nobody trained on. Together they train on 1.75 times the
shots, and so stay, with the scoring, within twice the time of the plain run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from clipfit import streams

RATIOS = tuple(k / 10 for k in range(11))
IMAGES, CLASSES = "images", "classes"
FEWEST_CLASSES = 4  # of which two halves can each be told apart
PARTS = 4  # of the shots of a trained class, class folds leave one out: of time alone, for they are not scored on it


@dataclass(frozen=True)
class Fold:
    """One adaptation, and what it is measured on; numbers of images and of classes.

    kind: "images", scored among all classes, or "classes", scored among those that were left out.
    """

    kind: str
    trained: tuple[int, ...]  # images
    classes: tuple[int, ...]  # that it is trained to tell apart
    left: tuple[int, ...]  # images
    candidates: tuple[int, ...]  # classes


@dataclass(frozen=True, eq=False)
class Scores:
    """Logits of the n images of a fold among its C candidates at A ratios: (A, n, C) float32; labels (n,) int64."""

    logits: torch.Tensor
    labels: torch.Tensor


def folds_of(labels: Sequence[int], contents: Sequence[Hashable], seed: int) -> list[Fold]:
    """The folds that these shots allow: images from two a class, classes from four.

    Args:
        labels: the class of each image, all of 0 … C − 1. contents: images of equal content stay together.
    """
    return [*_of_images(labels, contents, seed), *_of_classes(labels, contents, seed)]


def _of_images(labels: Sequence[int], contents: Sequence[Hashable], seed: int) -> list[Fold]:
    """Two halves of every class; an only image is trained on by both."""
    classes = tuple(range(max(labels) + 1))
    part = _dealt(labels, contents, 2, seed, 0)
    parts = _parts_of_classes(labels, part)
    folds = []
    for half in range(2):
        left = tuple(i for i, label in enumerate(labels) if part[i] == half and len(parts[label]) == 2)
        trained = tuple(i for i, label in enumerate(labels) if part[i] != half or len(parts[label]) < 2)
        if left:
            folds.append(Fold(IMAGES, trained, classes, left, classes))
    return folds


def _of_classes(labels: Sequence[int], contents: Sequence[Hashable], seed: int) -> list[Fold]:
    """Two halves of the classes, each trained on most of its images and scored on all of the other's."""
    count = max(labels) + 1
    if count < FEWEST_CLASSES:
        return []
    order = torch.randperm(count, generator=streams.generator(seed, "folds", 1)).tolist()
    halves = tuple(sorted(order[: count // 2])), tuple(sorted(order[count // 2 :]))
    part = _dealt(labels, contents, PARTS, seed, 2)
    kept, in_first = _parts_of_classes(labels, part), set(halves[0])
    folds = []
    for mine, others in (halves, halves[::-1]):
        own = [(label in in_first) == (mine is halves[0]) for label in labels]
        trained = tuple(
            i for i, label in enumerate(labels) if own[i] and (part[i] != PARTS - 1 or kept[label] == {PARTS - 1})
        )
        left = tuple(i for i in range(len(labels)) if not own[i])
        folds.append(Fold(CLASSES, trained, mine, left, others))
    return folds


def _parts_of_classes(labels: Sequence[int], part: Sequence[int]) -> dict[int, set[int]]:
    """In which parts each class has images."""
    found: dict[int, set[int]] = defaultdict(set)
    for label, its in zip(labels, part, strict=True):
        found[label].add(its)
    return found


def _dealt(labels: Sequence[int], contents: Sequence[Hashable], parts: int, seed: int, number: int) -> list[int]:
    """A part, of so many, for every image: each class is shuffled and dealt out, one class going on where the last
    one ended, so that parts are of even size and as even within each class as can be."""
    generator = streams.generator(seed, "folds", number)
    members: dict[int, dict[Hashable, list[int]]] = defaultdict(dict)
    for i, (label, content) in enumerate(zip(labels, contents, strict=True)):
        members[label].setdefault(content, []).append(i)
    dealt, turn = [0] * len(labels), 0
    for label in sorted(members):
        groups = list(members[label].values())
        for k in torch.randperm(len(groups), generator=generator).tolist():
            for i in groups[k]:
                dealt[i] = turn % parts
            turn += 1
    return dealt
