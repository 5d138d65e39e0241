"""Plain fine-tuning: cross-entropy over the text embeddings of all classes; both towers move."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clipfit.config.lora import LoraSettings
from clipfit.methods.base import Embeddings, Group, LoraDefaults, Method, NoOptions, Seen, ShotCounts, Task, Term

if TYPE_CHECKING:
    from clipfit.methods.batch import Batch
    from clipfit.model.clip import Texts
    from clipfit.streams import Rows


class Finetune:
    """L = CE(softmax_c(τ⁻¹·cos(u_i, t_c)), y_i) over all C classes, gradients into both towers."""

    groups: tuple[Group, ...] = ()
    teacher = None

    def __init__(self, task: Task, _options: NoOptions):
        self.clip, self.tokens = task.clip, task.tokens

    def classes(self, batch: Batch) -> Rows:
        return batch.text_rows(len(self.tokens))  # all C

    def embed(self, batch: Batch, texts: Texts) -> Seen:
        return Seen(self.clip.encode_image(batch.images, texts.class_tokens, batch.image_rows))  # (B, D)

    def terms(self, e: Embeddings, batch: Batch) -> dict[str, Term]:
        from torch.nn.functional import cross_entropy

        return {"ce": Term(1.0, cross_entropy(self.clip.scale * e.seen.u @ e.t.T, batch.labels))}


def clip_lora(counts: ShotCounts) -> Mapping[str, Any]:
    """CLIP-LoRA's recipe (arXiv 2405.18541): 500 steps of batch 32 for every shot of a class, up to its 16 shots."""
    size = counts.batch_size or 32
    epochs = math.ceil(500 * min(counts.of_largest_class, 16) / math.ceil(counts.in_all / size))
    return {"learning_rate": 2e-4, "weight_decay": 0.01, "batch_size": size, "epochs": epochs}


METHOD = Method(
    name="finetune",
    summary="plain fine-tuning with cross-entropy over the text embeddings of all classes",
    citation="the usual baseline; with --alpha it is WiSE-FT, arXiv 2109.01903, on a text classifier",
    options=NoOptions,
    build=Finetune,
    lora=LoraDefaults(LoraSettings(rank=2, alpha=1.0, dropout=0.25), clip_lora),
)
