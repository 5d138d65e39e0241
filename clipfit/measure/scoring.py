"""What is measured: classification among a set of class names, from texts alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clipfit.data.images import Images
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
