"""Plain fine-tuning: cross-entropy over the text embeddings of all classes; both towers move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from clipfit.config.lora import LoraSettings
from clipfit.methods.base import Extra, LoraDefaults, Method, NoOptions, Task, Term


class Finetune:
    """L = CE(softmax_c(τ⁻¹·cos(u_i, t_c)), y_i) over all C classes, gradients into both towers."""

    extra: Sequence[Extra] = ()

    def __init__(self, task: Task, _options: NoOptions):
        self.backbone, self.tokens = task.backbone, task.tokens

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Term]:
        u, t = self.backbone.encode(images, self.tokens)  # (B, D), (C, D)
        return {"ce": Term(1.0, F.cross_entropy(self.backbone.scale * u @ t.T, labels))}


def clip_lora(most: int, total: int, batch: int | None) -> Mapping[str, Any]:
    """CLIP-LoRA's recipe (arXiv 2405.18541): 500 steps of batch 32 for every shot of a class, up to its 16 shots."""
    size = batch or 32
    epochs = math.ceil(500 * min(most, 16) / math.ceil(total / size))
    return {"learning_rate": 2e-4, "weight_decay": 0.01, "batch_size": size, "epochs": epochs}


METHOD = Method(
    name="finetune",
    summary="plain fine-tuning with cross-entropy over the text embeddings of all classes",
    citation="the usual baseline; with --alpha it is WiSE-FT, arXiv 2109.01903, on a text classifier",
    options=NoOptions,
    build=Finetune,
    lora=LoraDefaults(LoraSettings(rank=2, alpha=1.0, dropout=0.25), clip_lora),
)
