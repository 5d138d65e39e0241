"""What is measured: classification among a set of class names, from texts alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clipfit.backbone import Backbone
from clipfit.data.images import Images
from clipfit.prompts import prompts


@torch.no_grad()
def image_embeddings(backbone: Backbone, images: Images, batch_size: int) -> torch.Tensor:
    """Embeddings of images that have the backbone's geometry: (n, D), unit norm, on the CPU."""
    parts = []
    for start in range(0, len(images), batch_size):
        batch = torch.stack([images[i] for i in range(start, min(start + batch_size, len(images)))])
        parts.append(backbone.encode_image(backbone.normalize(batch)).cpu())
    return torch.cat(parts) if parts else torch.empty(0, backbone.embed_dim)


@torch.no_grad()
def text_embeddings(backbone: Backbone, names: Sequence[str], template: str) -> torch.Tensor:
    """Embeddings of class names in a template: (C, D), unit norm, on the CPU."""
    return backbone.encode_text(backbone.tokenize(prompts(names, template))).cpu()


def best_names(images: torch.Tensor, texts: torch.Tensor, names: Sequence[str]) -> list[str]:
    """For image embeddings (n, D) and text embeddings (C, D): the name of the most similar text."""
    return [names[i] for i in (images @ texts.T).argmax(1).tolist()]
