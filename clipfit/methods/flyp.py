"""FLYP: fine-tune with the loss that CLIP was pre-trained with.

"Finetune like you pretrain: Improved finetuning of zero-shot vision models", arXiv 2212.00638.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipfit.methods.base import Embeddings, Group, Method, NoOptions, Seen, Task, Term

if TYPE_CHECKING:
    from clipfit.methods.batch import Batch
    from clipfit.model.clip import Texts
    from clipfit.streams import Rows


class Flyp:
    """Each image is paired with the text of its class; the batch's other pairs are the negatives."""

    groups: tuple[Group, ...] = ()
    teacher = None

    def __init__(self, task: Task, _options: NoOptions):
        self.clip, self.tokens = task.clip, task.tokens

    def classes(self, batch: Batch) -> Rows:
        return batch.present_rows  # U of C

    def embed(self, batch: Batch, texts: Texts) -> Seen:
        return Seen(self.clip.encode_image(batch.images, texts.class_tokens, batch.image_rows))  # (B, D)

    def terms(self, e: Embeddings, batch: Batch) -> dict[str, Term]:
        from clipfit.losses import batch_contrastive

        return {"contrastive": Term(1.0, batch_contrastive(e.seen.u, e.t[batch.classes], self.clip.scale))}


METHOD = Method(
    name="flyp",
    summary="fine-tuning with CLIP's own contrastive loss over the batch",
    citation='"Finetune like you pretrain: Improved finetuning of zero-shot vision models", arXiv 2212.00638',
    options=NoOptions,
    build=Flyp,
)
