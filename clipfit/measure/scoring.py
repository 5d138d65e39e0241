"""What is measured: classification among a set of class names, from texts alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clipfit.data.images import Images, ImageStore
from clipfit.measure.figures import Tables
from clipfit.measure.predictions import Predictions
from clipfit.model.clip import Clip, Texts
from clipfit.prompts import prompts


@torch.no_grad()
def image_embeddings(
    clip: Clip,
    images: Images,
    chosen: Sequence[int],
    batch_size: int,
    class_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Embeddings of n chosen images, in the CLIP's geometry: (n, D), unit norm, on the CPU.

    Args:
        class_tokens: of the texts they will be compared with (see `texts`), where the CLIP edits tokens.
    """
    parts = []
    for start in range(0, len(chosen), batch_size):
        batch = torch.stack([images[i] for i in chosen[start : start + batch_size]])
        parts.append(clip.encode_image(clip.normalize(batch), class_tokens).cpu())
    return torch.cat(parts) if parts else torch.empty(0, clip.embed_dim)


@torch.no_grad()
def texts(clip: Clip, names: Sequence[str], template: str) -> Texts:
    """Class names in a template: unit-norm embeddings (C, D) on the CPU, and what images need of them."""
    read = clip.read(clip.tokenize(prompts(names, template)))
    return Texts(read.embeddings.cpu(), read.class_tokens)


def best_names(images: torch.Tensor, texts: torch.Tensor, names: Sequence[str]) -> list[str]:
    """For image embeddings (n, D) and text embeddings (C, D): the name of the most similar text."""
    return [names[i] for i in (images @ texts.T).argmax(1).tolist()]


def predict(
    clip: Clip,
    images: ImageStore,
    chosen: Sequence[int],
    candidates: Sequence[str],
    template: str,
    alpha: float,
    batch_size: int,
) -> Predictions:
    """Chosen images, in the CLIP's geometry, against the candidates; `alpha` is what the table will say.

    Beside the images of one batch, memory holds the logits alone.
    """
    t, z = texts(clip, candidates, template)  # (C, D)
    logits = torch.empty(len(chosen), len(candidates))
    for start in range(0, len(chosen), batch_size):
        batch = chosen[start : start + batch_size]
        u = image_embeddings(clip, images, batch, batch_size, z)  # (B, D)
        logits[start : start + len(batch)] = clip.logits(u, t)
    samples = [images.samples[i] for i in chosen]
    return Predictions(
        tuple(sample.source for sample in samples), tuple(sample.label for sample in samples), tuple(candidates),
        logits, alpha, template, clip.precision,
    )  # fmt: skip


def tables(
    clip: Clip,
    images: ImageStore,
    base: Sequence[str],
    new: Sequence[str],
    template: str,
    alpha: float,
    batch_size: int,
) -> Tables:
    """All images among base and new classes together; what they are among fewer follows from that.

    Not so with edited patch tokens, which depend on what an image is compared with: then the images of base classes
    among those alone, and likewise of new ones, are passes and tables of their own.
    """
    labels = [sample.label for sample in images.samples]
    found = {"union": predict(clip, images, range(len(labels)), [*base, *new], template, alpha, batch_size)}
    if clip.edits:
        for part, names in (("new", new), ("base", base)):
            own = [i for i, label in enumerate(labels) if label in names]
            if own:
                found[part] = predict(clip, images, own, names, template, alpha, batch_size)
    return found
