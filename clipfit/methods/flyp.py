"""FLYP: fine-tune with the loss that CLIP was pre-trained with.

"Finetune like you pretrain: Improved finetuning of zero-shot vision models", arXiv 2212.00638.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clipfit.losses import batch_contrastive
from clipfit.methods.base import Extra, Method, NoOptions, Task, Term


class Flyp:
    """Each image is paired with the text of its class; the batch's other pairs are the negatives."""

    extra: Sequence[Extra] = ()

    def __init__(self, task: Task, _options: NoOptions):
        self.backbone, self.tokens = task.backbone, task.tokens

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Term]:
        present, classes = labels.unique(return_inverse=True)
        u = self.backbone.encode_image(images)  # (B, D)
        t = self.backbone.encode_text(self.tokens[present])  # (U, D)
        return {"contrastive": Term(1.0, batch_contrastive(u, t[classes], self.backbone.scale))}


METHOD = Method(
    name="flyp",
    summary="fine-tuning with CLIP's own contrastive loss over the batch",
    citation='"Finetune like you pretrain: Improved finetuning of zero-shot vision models", arXiv 2212.00638',
    options=NoOptions,
    build=Flyp,
)
