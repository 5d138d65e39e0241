"""What a table of predictions gets wrong: pairs of classes that mix, classes one by one, images that it is sure of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from clipfit.measure.figures import AlphaResult
from clipfit.measure.predictions import Predictions


@dataclass(frozen=True)
class Pair:
    """Two classes that are taken for each other. one_as_other: images of `one` that are taken for `other`; n_one: all
    images of `one`. The direction that occurs more often is `one` for `other`."""

    one: str
    other: str
    one_as_other: int
    other_as_one: int
    n_one: int
    n_other: int

    @property
    def mixed(self) -> int:
        return self.one_as_other + self.other_as_one


def mixed(table: Predictions, most: int) -> list[Pair]:
    """The pairs of classes that mix most, by images; of equals the first in the table's order of names."""
    found = table.confusion()
    n = Counter(label for label in table.labels if label is not None)
    place = {name: k for k, name in enumerate(table.candidates)}
    pairs = []
    for one, other in {tuple(sorted(pair, key=lambda x: place.get(x, -1))) for pair in found if pair[0] != pair[1]}:
        there, back = found.get((one, other), 0), found.get((other, one), 0)
        if back > there:
            one, other, there, back = other, one, back, there
        pairs.append(Pair(one, other, there, back, n[one], n[other]))
    return sorted(pairs, key=lambda p: (-p.mixed, -p.one_as_other, place.get(p.one, -1), place.get(p.other, -1)))[:most]


@dataclass(frozen=True)
class Matrix:
    """counts[i][j]: images of rows[i] that are taken for columns[j]. Rows are the classes that have images."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


def matrix(table: Predictions) -> Matrix:
    """All of the confusion; for tables of few names."""
    found, present = table.confusion(), set(table.labels)
    rows = tuple(name for name in table.candidates if name in present)
    return Matrix(rows, table.candidates, tuple(tuple(found.get((r, c), 0) for c in table.candidates) for r in rows))


@dataclass(frozen=True)
class ClassRow:
    """One class within its part. right, before: of n images, by the model and by zero-shot CLIP. n = 0: none was
    measured. taken_for: the wrong name that its images are given most often, and how many are."""

    name: str
    part: str
    shots: int
    n: int
    right: int
    before: int
    taken_for: tuple[str, int] | None


def class_rows(
    row: AlphaResult | None,
    zero_shot: AlphaResult | None,
    classes: Mapping[str, Sequence[str]],
    shots: Mapping[str, int],
    confusion: Mapping[tuple[str, str], int],
) -> list[ClassRow]:
    """Every class, in order. classes: by part. confusion: of the table that most is shown of."""
    wrong: dict[str, tuple[str, int]] = {}
    for (label, name), count in confusion.items():
        if label != name and count > wrong.get(label, ("", 0))[1]:
            wrong[label] = (name, count)
    rows = []
    for part, names in classes.items():
        now, then = getattr(row, part, None), getattr(zero_shot, part, None)
        for name in names:
            right, n = now.per_class.get(name, (0, 0)) if now else (0, 0)
            before = then.per_class.get(name, (0, 0))[0] if then else 0
            rows.append(ClassRow(name, part, shots.get(name, 0), n, right, before, wrong.get(name)))
    return rows


@dataclass(frozen=True)
class Mistake:
    """An image that is given a wrong name. top: the names thought likeliest, best first, with their probabilities.

    own: the probability of its label. before: what zero-shot CLIP takes it for.
    """

    id: str
    label: str
    top: tuple[tuple[str, float], ...]
    own: float
    before: str | None


def worst(
    table: Predictions, most: int, temperature: float = 1.0, zero_shot: Predictions | None = None, top: int = 3
) -> list[Mistake]:
    """The wrong answers that are given with most certainty; of equally certain ones the first images."""
    place = {name: k for k, name in enumerate(table.candidates)}
    names = table.names
    wrong = [i for i, label in enumerate(table.labels) if label is not None and names[i] != label]
    p = (table.logits[wrong].double() / temperature).softmax(1)  # (wrong, C)
    before = zero_shot.names if zero_shot and zero_shot.ids == table.ids else None
    order = p.amax(1).argsort(descending=True, stable=True).tolist()[:most] if wrong else []
    found = []
    for k in order:
        label = table.labels[wrong[k]]
        assert label is not None
        values, best = p[k].sort(descending=True, stable=True)
        named = tuple((table.candidates[c], v) for c, v in zip(best[:top].tolist(), values[:top].tolist(), strict=True))
        own = float(p[k, place[label]]) if label in place else 0.0
        found.append(Mistake(table.ids[wrong[k]], label, named, own, before[wrong[k]] if before else None))
    return found


def nearest(images: torch.Tensor, shots: torch.Tensor, count: int) -> list[list[tuple[int, float]]]:
    """For unit-norm embeddings (n, D) and (m, D): the shots that are nearest to each image, with their cosines."""
    values, order = (images @ shots.T).sort(dim=1, descending=True, stable=True)  # (n, m)
    rows = zip(order[:, :count].tolist(), values[:, :count].tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]
