"""Forgetting: what becomes of other labelled folders, and how far similarities move on images without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from clipfit.config import EvaluateConfig
from clipfit.data.images import ImageStore, Views
from clipfit.data.layout import Sample
from clipfit.measure import held_out, scoring
from clipfit.measure.metrics import Accuracy, Difference
from clipfit.measure.predictions import Predictions
from clipfit.model.clip import Clip
from clipfit.prompts import Templates
from clipfit.runs.run import Run

# ---- labelled


@dataclass(frozen=True)
class RetainedRow:
    """A labelled place at one α: within its own classes, beside zero-shot CLIP on the same images."""

    alpha: float
    accuracy: Accuracy
    against_zero_shot: Difference


@dataclass(frozen=True)
class Retained:
    """What `--retain` found of one place, α by α, 0 first. skipped: images that could not be read."""

    data: str
    classes: tuple[str, ...]
    rows: tuple[RetainedRow, ...]
    skipped: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """One entry of `retain` in `evaluate --json`."""
        return {
            "data": self.data,
            "classes": list(self.classes),
            "alphas": [
                {"alpha": row.alpha, **row.accuracy.as_json(), "against_zero_shot": asdict(row.against_zero_shot)}
                for row in self.rows
            ],
            "skipped": list(self.skipped),
        }


def retained_rows(tables: Mapping[float, Predictions]) -> tuple[RetainedRow, ...]:
    """The figures of tables by α, of which 0 is one."""
    return tuple(
        RetainedRow(alpha, table.accuracy(), table.gain_over(tables[0.0]) if alpha else Difference(0.0, 0.0, 0.0))
        for alpha, table in tables.items()
    )


# ---- without labels


@dataclass(frozen=True)
class Seen:
    """Unit-norm embeddings of images u (n, D) and of classes t (C, D)."""

    images: torch.Tensor
    classes: torch.Tensor


@dataclass(frozen=True)
class DriftRow:
    """How far a model at one α is from zero-shot CLIP, on images without labels; all of α = 0 is nothing, exactly.

    With u, t at this α and u⁰, t⁰ at α = 0, n images and C classes:

    mean_change: the mean of |u_i·t_c − u⁰_i·t⁰_c| over all n·C pairs. p95_change: the least of these values that
    95% of them do not exceed. image_cosine: the mean of u_i·u⁰_i. best_changed: the share of images whose
    argmax_c u_i·t_c is another class than argmax_c u⁰_i·t⁰_c; of equals the first counts.
    """

    alpha: float
    mean_change: float = 0.0
    p95_change: float = 0.0
    image_cosine: float = 1.0
    best_changed: float = 0.0


@dataclass(frozen=True)
class Drift:
    """What `--drift` found, α by α, 0 first. skipped: images that could not be read."""

    data: str
    n: int
    classes: tuple[str, ...]
    rows: tuple[DriftRow, ...]
    skipped: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """`drift` in `evaluate --json`."""
        return {
            "data": self.data,
            "n": self.n,
            "classes": list(self.classes),
            "alphas": [asdict(row) for row in self.rows],
            "skipped": list(self.skipped),
        }


def drift_row(alpha: float, now: Seen, before: Seen) -> DriftRow:
    """What moved between α = 0 and this α; holds a float32 for every pair of image and class."""
    similarity, similarity_before = now.images @ now.classes.T, before.images @ before.classes.T  # (n, C)
    best, best_before = similarity.argmax(1), similarity_before.argmax(1)
    change = similarity.sub_(similarity_before).abs_().flatten()  # (n·C,)
    return DriftRow(
        alpha,
        float(change.double().mean()),
        float(change.kthvalue(-(-95 * len(change) // 100)).values),
        float((now.images * before.images).sum(1).double().mean()),
        float((best != best_before).double().mean()),
    )


# ---- what is asked for


@dataclass(frozen=True)
class Place:
    """Images of another place, decoded, and the classes that they are compared with. `data`: as it was given."""

    data: str
    classes: tuple[str, ...]
    images: ImageStore
    unread: tuple[str, ...] = ()

    @property
    def skipped(self) -> tuple[str, ...]:
        return (*self.unread, *self.images.skipped)


class Elsewhere:
    """What `--retain` and `--drift` name: found, then decoded, then looked at α by α, 0 first."""

    def __init__(self, run: Run, config: EvaluateConfig, views_of: Callable[[], Views]):
        """`views_of`: of each place. Raises DataError or UsageError where there is nothing to measure: see held_out."""
        self._labelled, self._unlabelled = [], []
        for place in config.retain:
            views = views_of()
            self._labelled.append((str(place), held_out.labelled(run, place, views), views))
        if config.drift:
            views = views_of()
            found = held_out.unlabelled(run, config.drift, config.skip_bad_images, views)
            self._unlabelled.append((str(config.drift), found, views))
        self._places: list[Place] = []
        self._streams: list[Place] = []  # one or none
        self._first: Seen | None = None
        self._rows: list[DriftRow] = []
        self.tables: list[dict[float, Predictions]] = []

    @property
    def notes(self) -> tuple[str, ...]:
        """What one should know of the places."""
        return tuple(note for _, found, _ in (*self._labelled, *self._unlabelled) for note in found.notes)

    def decode(self, store: Callable[[Sequence[Sample], Views], ImageStore], classes: tuple[str, ...]) -> None:
        """Raises DataError for what cannot be read. `classes`: what images without labels are compared with."""
        self._places = [
            Place(data, found.classes, store(found.samples, views)) for data, found, views in self._labelled
        ]
        self._streams = [
            Place(data, classes, store(found.samples, views), found.unread) for data, found, views in self._unlabelled
        ]
        self.tables = [{} for _ in self._places]

    def look(self, clip: Clip, templates: Templates, alpha: float, batch_size: int) -> None:
        """Measure the CLIP as it is now, which is at α."""
        for place, tables in zip(self._places, self.tables, strict=True):
            chosen = range(len(place.images))
            tables[alpha] = scoring.predict(clip, place.images, chosen, place.classes, templates, alpha, batch_size)
        for stream in self._streams:
            t, z = scoring.texts(clip, stream.classes, templates)
            u = scoring.image_embeddings(clip, stream.images, range(len(stream.images)), batch_size, z)
            self._rows.append(drift_row(alpha, Seen(u, t), self._first) if self._first else DriftRow(alpha))
            self._first = self._first or Seen(u, t)

    def retained(self) -> tuple[Retained, ...]:
        """What was found of each labelled place."""
        return tuple(
            Retained(place.data, place.classes, retained_rows(tables), place.skipped)
            for place, tables in zip(self._places, self.tables, strict=True)
        )

    def drift(self) -> Drift | None:
        """What was found without labels; None where nothing was asked for."""
        found = [Drift(s.data, len(s.images), s.classes, tuple(self._rows), s.skipped) for s in self._streams]
        return found[0] if found else None
