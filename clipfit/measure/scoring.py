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
    backbone: Clip,
    images: Images,
    chosen: Sequence[int],
    batch_size: int,
    class_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Embeddings of n chosen images, which have the backbone's geometry: (n, D), unit norm, on the CPU.

    Args:
        class_tokens: of the texts they will be compared with (see `texts`), where the backbone edits tokens.
    """
    parts = []
    for start in range(0, len(chosen), batch_size):
        batch = torch.stack([images[i] for i in chosen[start : start + batch_size]])
        parts.append(backbone.encode_image(backbone.normalize(batch), class_tokens).cpu())
    return torch.cat(parts) if parts else torch.empty(0, backbone.embed_dim)


@torch.no_grad()
def texts(backbone: Clip, names: Sequence[str], template: str) -> Texts:
    """Class names in a template: unit-norm embeddings (C, D) on the CPU, and what images need of them."""
    read = backbone.read(backbone.tokenize(prompts(names, template)))
    return Texts(read.embeddings.cpu(), read.class_tokens)


def best_names(images: torch.Tensor, texts: torch.Tensor, names: Sequence[str]) -> list[str]:
    """For image embeddings (n, D) and text embeddings (C, D): the name of the most similar text."""
    return [names[i] for i in (images @ texts.T).argmax(1).tolist()]


def predict(
    backbone: Clip,
    images: ImageStore,
    chosen: Sequence[int],
    candidates: Sequence[str],
    template: str,
    alpha: float,
    batch_size: int,
) -> Predictions:
    """Chosen images, which have the backbone's geometry, against the candidates; `alpha` is what the table will say.

    Beside the images of one batch, memory holds the logits alone.
    """
    t, z = texts(backbone, candidates, template)  # (C, D)
    logits = torch.empty(len(chosen), len(candidates))
    for start in range(0, len(chosen), batch_size):
        batch = chosen[start : start + batch_size]
        u = image_embeddings(backbone, images, batch, batch_size, z)  # (B, D)
        logits[start : start + len(batch)] = backbone.scale.cpu() * u @ t.T
    samples = [images.samples[i] for i in chosen]
    return Predictions(
        tuple(sample.source for sample in samples), tuple(sample.label for sample in samples), tuple(candidates),
        logits, alpha, template, backbone.precision,
    )  # fmt: skip


def tables(
    backbone: Clip,
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
    found = {"union": predict(backbone, images, range(len(labels)), [*base, *new], template, alpha, batch_size)}
    if backbone.edits:
        for part, names in (("new", new), ("base", base)):
            own = [i for i, label in enumerate(labels) if label in names]
            if own:
                found[part] = predict(backbone, images, own, names, template, alpha, batch_size)
    return found
