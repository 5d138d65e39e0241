"""What a model says of class names and labels: texts that are one to it, and images that it takes for others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from clipfit.data.findings import Finding, error, hint
from clipfit.data.layout import Sample
from clipfit.data.names import some
from clipfit.prompts import key_of

# how far texts of different things lie apart is the model's own: these say it
EVERYDAY = (
    "dog", "car", "tree", "house", "chair", "fish", "bird", "apple", "shoe", "clock",
    "bridge", "guitar", "boat", "flower", "bottle", "hat", "key", "book", "train", "cup",
)  # fmt: skip
HARDLY_APART = 0.25  # of what everyday things lie apart
LEAST_ACCURACY = 0.5  # of zero-shot on the labels, for it to say anything of them
NEIGHBOURS = 5
BLOCK = 1024


def same_tokens(names: Sequence[str], tokens: torch.Tensor) -> list[Finding]:
    """Classes whose texts, tokens (C, length), are one to the model. Other spellings of a name are left aside."""
    by_tokens: dict[tuple[int, ...], list[str]] = {}
    for name, row in zip(names, tokens.tolist(), strict=True):
        by_tokens.setdefault(tuple(row), []).append(name)
    return [
        error("same-tokens", f"{some(alike)} are the same tokens to this model", "rename them with --classes",
              classes=tuple(alike))
        for alike in by_tokens.values()
        if len({key_of(name) for name in alike}) > 1
    ]  # fmt: skip


def long_names(names: Sequence[str], cut: Sequence[bool]) -> list[Finding]:
    """Names that are cut at the model's context."""
    return [
        hint("long-name", f"{name!r} is longer than this model reads: the end of its text is cut",
             "give it a shorter name with --classes, or take a shorter template", classes=(name,))
        for name, is_cut in zip(names, cut, strict=True)
        if is_cut
    ]  # fmt: skip


def confusable_names(names: Sequence[str], texts: torch.Tensor, everyday: torch.Tensor) -> list[Finding]:
    """Each class beside the one whose text is nearest, where they lie less than a quarter as far apart, in 1 − cosine,
    as everyday things do. texts: (C, D), everyday: (20, D), of unit norm. Pairs with the same text are left aside."""
    if len(names) < 2:
        return []
    upper = torch.ones(len(everyday), len(everyday), dtype=torch.bool).triu(1)
    usual = (1 - everyday @ everyday.T)[upper].median()
    pairs: dict[tuple[int, int], float] = {}
    for start in range(0, len(names), BLOCK):
        apart = (1 - texts[start : start + BLOCK] @ texts.T) / usual  # (≤ BLOCK, C)
        apart.diagonal(start).fill_(torch.inf)
        for k, (least, other) in enumerate(zip(*(found.tolist() for found in apart.min(1)), strict=True)):
            if 1e-4 < least < HARDLY_APART:
                pairs[min(start + k, other), max(start + k, other)] = least
    return [
        hint("confusable-names",
             f"{names[i]!r} and {names[j]!r} are {share:.0%} as far apart as everyday things to the text tower",
             "say what tells them apart, with --classes", classes=(names[i], names[j]))
        for (i, j), share in sorted(pairs.items(), key=lambda pair: pair[1])
    ]  # fmt: skip


def doubtful_labels(
    samples: Sequence[Sample],
    names: Sequence[str],
    images: torch.Tensor,
    logits: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[list[Finding], str | None]:
    """Images that are probably labelled wrongly; or why nothing can be said of labels.

    Three must agree. Confident learning (Northcutt et al. 2021, arXiv 1911.00068): zero-shot gives the image another
    class j with at least the mean probability t_j that images labelled j have of j. The mean embedding of the images
    labelled j is nearer than those of all other classes, the image itself left out of its own. None of the five
    nearest images has its label.

    Args:
        images: embeddings (n, D) of unit norm. logits: of embeddings (B, D), among the names: (B, C).
    """
    place = {name: c for c, name in enumerate(names)}
    labels = torch.tensor([place[sample.label] for sample in samples], dtype=torch.long)
    if len(names) < 2 or not len(labels):
        return [], None
    own, right = _own_probability(images, labels, logits)
    if right < LEAST_ACCURACY:
        return [], (
            f"labels were not judged: zero-shot names {right:.0%} of the images as they are labelled, too few to say "
            "which label is wrong"
        )
    count = torch.bincount(labels, minlength=len(names))
    threshold = torch.zeros(len(names)).index_add_(0, labels, own) / count  # NaN, never reached, of no images
    sums = torch.zeros(len(names), images.shape[1]).index_add_(0, labels, images)
    found = []
    for start in range(0, len(labels), BLOCK):
        u, y = images[start : start + BLOCK], labels[start : start + BLOCK]
        p = logits(u).softmax(1)
        counted, other = torch.where(p >= threshold, p, -1.0).max(1)  # −1: it counts as none
        near = _nearest_mean(u, y, sums, count)
        labels_near = labels[_neighbours(images, start, len(y))]  # (B, ≤ 5)
        doubtful = (counted > 0) & (other != y) & (near == other) & (labels_near != y[:, None]).all(1)
        for k in doubtful.nonzero().flatten().tolist():
            found.append(_doubtful(samples[start + k], names[int(other[k])], float(counted[k])))
    return found, None


def _own_probability(
    images: torch.Tensor, labels: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, float]:
    """The probability of each image's label (n,), and the share whose label is the most probable."""
    own, right = [], 0
    for u, y in zip(images.split(BLOCK), labels.split(BLOCK), strict=True):
        p = logits(u).softmax(1)
        own.append(p.gather(1, y[:, None])[:, 0])
        right += int((p.argmax(1) == y).sum())
    return torch.cat(own), right / len(labels)


def _nearest_mean(u: torch.Tensor, y: torch.Tensor, sums: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The class whose mean embedding is nearest to each of (B, D) labelled y, which is left out of its own."""
    norm = torch.nn.functional.normalize
    cosine = u @ norm(sums, dim=1).T
    cosine[:, count == 0] = -torch.inf
    without = (u * norm(sums[y] - u, dim=1)).sum(1)
    cosine[torch.arange(len(y)), y] = torch.where(count[y] > 1, without, -torch.inf)
    return cosine.argmax(1)


def _neighbours(images: torch.Tensor, start: int, rows: int) -> torch.Tensor:
    """The (at most five) nearest other images of each of `rows` from `start`, as indices (rows, ≤ 5)."""
    cosine = images[start : start + rows] @ images.T
    cosine.diagonal(start).fill_(-torch.inf)
    return cosine.topk(min(NEIGHBOURS, len(images) - 1), dim=1).indices


def _doubtful(sample: Sample, other: str, probability: float) -> Finding:
    message = (
        f"{sample.source} is labelled {sample.label!r}, but zero-shot names it {other!r} ({probability:.0%}), and none "
        f"of the images most like it is {sample.label!r}"
    )
    return hint("doubtful-label", message, "look at it; move it if the label is wrong", (sample.source,),
                (sample.label, other))  # fmt: skip
