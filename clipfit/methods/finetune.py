"""Plain fine-tuning: cross-entropy over the text embeddings of all classes; both towers move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from clipfit.methods.base import Method, NoOptions, Task, Term


class Finetune:
    """L = CE(softmax_c(τ⁻¹·cos(u_i, t_c)), y_i) over all C classes, gradients into both towers."""

    extra: Sequence[torch.nn.Parameter] = ()

    def __init__(self, task: Task, _options: NoOptions):
        self.backbone, self.tokens = task.backbone, task.tokens

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Term]:
        u = self.backbone.encode_image(images)  # (B, D)
        t = self.backbone.encode_text(self.tokens)  # (C, D)
        return {"ce": Term(1.0, F.cross_entropy(self.backbone.scale * u @ t.T, labels))}


METHOD = Method(
    name="finetune",
    summary="plain fine-tuning with cross-entropy over the text embeddings of all classes",
    citation="the usual baseline; with --alpha it is WiSE-FT, arXiv 2109.01903, on a text classifier",
    options=NoOptions,
    build=Finetune,
)
