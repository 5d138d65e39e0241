"""Carrying folds out: adapt on a part of the shots, score what was left out at every ratio, begin again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from clipfit import ranks
from clipfit.adaptation import Adaptation
from clipfit.data.images import Chosen, Held, Images
from clipfit.ensemble import State, interpolate
from clipfit.errors import ModelError
from clipfit.events import Progress
from clipfit.measure import scoring
from clipfit.measure.folds import CLASSES, Fold, Scores
from clipfit.model.clip import Clip, Texts
from clipfit.runs import files
from clipfit.training.saving import Saving, differences

AT_ONCE = 512  # images cut to size and held
BATCH = 64


@dataclass(frozen=True)
class Subject:
    """What is adapted, on what: the model, its weights as they were pre-trained, and labelled images.

    clip: is left with other weights. images: for training. views: the same ones in the model's geometry, to measure on.
    """

    adaptation: Adaptation
    clip: Clip
    pretrained: State
    names: Sequence[str]
    images: Images
    views: Images
    labels: Sequence[int]


def carry_out(
    subject: Subject, folds: Sequence[Fold], ratios: Sequence[float], progress: Progress, saving: Saving | None
) -> list[Scores]:
    """The scores of every fold, in order.

    Args:
        saving: where a fold that is not finished, and the scores of those that are, can be gone on from.

    Raises:
        NonFiniteError: a loss is not a finite number.
    """
    found = []
    for number, fold in enumerate(folds, 1):
        kept = _of_fold(saving, number, fold, ratios) if saving else None
        scores = _stored(kept) if kept else None
        if scores is None:
            what = f"{len(fold.candidates)} classes" if fold.kind == CLASSES else f"{len(fold.left)} images"
            progress.say(f"fold {number} of {len(folds)}: {what} left out")
            scores = _one(subject, fold, ratios, progress, kept)
            if kept:
                _store(kept, scores)
        found.append(scores)
    return found


def score(
    subject: Subject, finetuned: State, images: Images, chosen: Sequence[int], labels: Sequence[int],
    names: Sequence[str], ratios: Sequence[float],
) -> Scores:  # fmt: skip
    """Chosen images, in the model's geometry, among the names at every ratio; leaves the model at the last one.

    Args:
        labels: of the chosen images, by their place among the names.
    """
    clip, templates = subject.clip, subject.adaptation.templates
    before, after = (
        {name: t.to(clip.device) for name, t in state.items()} for state in (subject.pretrained, finetuned)
    )
    read: dict[float, Texts] = {}
    parts = []
    for start in range(0, len(chosen), AT_ONCE):
        views = Held(images, chosen[start : start + AT_ONCE])  # cut to size once, not once a ratio
        tables = []
        for alpha in ratios:
            clip.load_state(interpolate(before, after, alpha))
            if alpha not in read:
                read[alpha] = scoring.texts(clip, names, templates)
            t, z = read[alpha]
            u = scoring.image_embeddings(clip, views, range(len(views)), BATCH, z)  # (b, D)
            tables.append(clip.logits(u, t))
        parts.append(torch.stack(tables))
    return Scores(torch.cat(parts, 1), torch.tensor(labels))


def _one(subject: Subject, fold: Fold, ratios: Sequence[float], progress: Progress, kept: Saving | None) -> Scores:
    clip = subject.clip
    clip.load_state(subject.pretrained)
    labels = [fold.classes.index(subject.labels[i]) for i in fold.trained]
    names = [subject.names[c] for c in fold.classes]
    shots = Chosen(subject.images, fold.trained)
    subject.adaptation.run(clip, names, shots, labels, subject.pretrained, progress.step, progress.say, kept)
    left = [fold.candidates.index(subject.labels[i]) for i in fold.left]
    candidates = [subject.names[c] for c in fold.candidates]
    return score(subject, clip.snapshot(), subject.views, fold.left, left, candidates, ratios)


# ---- what a kill leaves


def _of_fold(saving: Saving, number: int, fold: Fold, ratios: Sequence[float]) -> Saving:
    what = {"kind": fold.kind, "trained": fold.trained, "left": fold.left, "ratios": ratios}
    identity = {**saving.identity, "fold": {key: list(value) for key, value in what.items()}}
    return replace(saving, folder=saving.folder / f"fold-{number}", identity=identity)


def _scores_of(kept: Saving) -> Path:
    return kept.folder / "scores.safetensors"


def _store(kept: Saving, scores: Scores) -> None:
    """In place of the fold's training state, which is of no more use. One process writes, all have the scores."""
    if not ranks.here().leads:
        return
    files.write_tensors(_scores_of(kept), {"logits": scores.logits, "labels": scores.labels}, kept.identity)
    kept.path.unlink(missing_ok=True)


def _stored(kept: Saving) -> Scores | None:
    if not kept.resume:
        return None
    try:
        tensors, identity = files.read_tensors(_scores_of(kept))
        return None if differences(identity, kept.identity) else Scores(tensors["logits"], tensors["labels"])
    except (ModelError, KeyError):
        return None
