"""CLIP-CITE: full fine-tuning with three losses.

"Fully Fine-tuned CLIP Models are Efficient Few-Shot Learners", arXiv 2407.04003.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipfit.config.options import Checked, option
from clipfit.methods.base import Embeddings, Group, Method, Seen, Task, Term

if TYPE_CHECKING:
    from clipfit.methods.batch import Batch
    from clipfit.model.clip import Texts
    from clipfit.streams import Rows


@dataclass(frozen=True)
class CiteOptions(Checked):
    """The weights of eq. 6, and whether eq. 4 is read literally (see losses.supervised_contrastive)."""

    dva_weight: float = option(1.0, "Weight of the alignment with the classifier; the paper has none, 1.", low=0)
    scl_weight: float = option(0.7, "λ, weight of the contrastive loss.", low=0)
    vld_weight: float = option(0.1, "η, weight of the distillation from the pre-trained model.", low=0)
    literal_scl: bool = option(False, "Eq. 4 as printed, the positive pair left out of its denominator.")


class Cite:
    """L = L_DVA + λ·L_SCL + η·L_VLD (eq. 6)."""

    def __init__(self, task: Task, options: CiteOptions):
        import torch

        from clipfit.model.clip import FrozenImageTower

        self.clip, self.options, self.tokens = task.clip, options, task.tokens
        self.teacher = FrozenImageTower(task.clip, task.pretrained)  # it sees the same augmented images
        with torch.no_grad():
            self.teacher_t = task.clip.encode_text(task.tokens)  # (C, D)
        self.classifier = torch.nn.Parameter(self.teacher_t.clone())  # W, starts as the zero-shot classifier
        self.groups: tuple[Group, ...] = (Group({"cite.classifier": self.classifier}),)

    def classes(self, batch: Batch) -> Rows:
        return batch.present_rows  # U of C

    def embed(self, batch: Batch, texts: Texts) -> Seen:
        return Seen(self.clip.encode_image(batch.images, texts.class_tokens, batch.image_rows))  # (B, D)

    def terms(self, e: Embeddings, batch: Batch) -> dict[str, Term]:
        from clipfit.losses import similarity_distillation, supervised_contrastive, visual_text_alignment

        assert e.teacher_u is not None
        scale, literal = self.clip.scale, self.options.literal_scl
        u, dva_u = e.seen
        dva = visual_text_alignment(u if dva_u is None else dva_u, self.classifier, batch.labels, scale)
        scl = supervised_contrastive(u, e.t, batch.classes, scale, positive_in_denominator=not literal)
        vld = similarity_distillation(u, e.t, e.teacher_u, self.teacher_t[batch.present], batch.counts, scale)
        return {
            "dva": Term(self.options.dva_weight, dva),
            "scl": Term(self.options.scl_weight, scl),
            "vld": Term(self.options.vld_weight, vld),
        }


METHOD = Method(
    name="cite",
    summary="full fine-tuning with alignment, supervised contrastive and distillation losses",
    citation='"Fully Fine-tuned CLIP Models are Efficient Few-Shot Learners", arXiv 2407.04003',
    options=CiteOptions,
    build=Cite,
)
