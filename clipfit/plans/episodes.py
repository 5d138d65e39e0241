"""Few-shot episodes: a few classes of a set, shots and queries of each, drawn anew each time by their number."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clipfit.config.plan import Plan
from clipfit.errors import DataError
from clipfit.streams import generator


@dataclass(frozen=True)
class Episode:
    """Classes, and indices of images: support[c] are the shots of class c, query[c] what is measured on."""

    classes: tuple[str, ...]
    support: tuple[tuple[int, ...], ...]
    query: tuple[tuple[int, ...], ...]


def draw(labels: Sequence[str], plan: Plan, shots: int, number: int) -> Episode:
    """Episode `number`: the same classes and query images at every number of shots, more shots containing fewer.

    Raises:
        DataError: fewer than `way` classes have enough images.
    """
    need = max(plan.shots) + plan.query
    by_class: dict[str, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        by_class[label].append(i)
    enough = sorted(name for name, at in by_class.items() if len(at) >= need)
    if len(enough) < plan.way:
        raise DataError(
            f"{plan.way}-way episodes need {plan.way} classes of at least {need} images ({max(plan.shots)} shots and "
            f"{plan.query} queries), but there are {len(enough)}: lower way, shots or query."
        )
    stream = generator(plan.seeds[0], "episodes", number)
    classes = [enough[k] for k in torch.randperm(len(enough), generator=stream)[: plan.way].tolist()]
    support, query = [], []
    for name in classes:
        order = [by_class[name][k] for k in torch.randperm(len(by_class[name]), generator=stream).tolist()]
        query.append(tuple(order[: plan.query]))
        support.append(tuple(order[plan.query : plan.query + shots]))
    return Episode(tuple(classes), tuple(support), tuple(query))
