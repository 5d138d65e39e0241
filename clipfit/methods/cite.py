"""CLIP-CITE: full fine-tuning with three losses.

"Fully Fine-tuned CLIP Models are Efficient Few-Shot Learners", arXiv 2407.04003.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clipfit.errors import UsageError
from clipfit.losses import similarity_distillation, supervised_contrastive, visual_text_alignment
from clipfit.methods.base import Extra, Method, Task, Term


@dataclass(frozen=True)
class CiteOptions:
    """λ and η of eq. 6, and whether eq. 4 is read literally (see losses.supervised_contrastive)."""

    scl_weight: float = 0.7
    vld_weight: float = 0.1
    literal_scl: bool = False

    def __post_init__(self) -> None:
        for name in ("scl_weight", "vld_weight"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative; found {getattr(self, name)}.")


class Cite:
    """L = L_DVA + λ·L_SCL + η·L_VLD (eq. 6)."""

    def __init__(self, task: Task, options: CiteOptions):
        self.backbone, self.options, self.tokens = task.backbone, options, task.tokens
        self.teacher = task.backbone.frozen_copy()
        with torch.no_grad():
            self.teacher_text = self.teacher.encode_text(task.tokens)  # (C, D)
        self.classifier = torch.nn.Parameter(self.teacher_text.clone())  # W, starts as the zero-shot classifier
        self.extra: Sequence[Extra] = (Extra([self.classifier]),)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Term]:
        present = labels.unique()  # (U,)
        u = self.backbone.encode_image(images)  # (B, D)
        t = self.backbone.encode_text(self.tokens[present])  # (U, D)
        return self.terms(images, labels, u, u, t)

    def terms(
        self, images: torch.Tensor, labels: torch.Tensor, u: torch.Tensor, dva_u: torch.Tensor, t: torch.Tensor
    ) -> dict[str, Term]:
        """The three losses of embeddings u (B, D), dva_u (B, D) for L_DVA, and t (U, D) of the batch's classes."""
        scale = self.backbone.scale
        present, classes, counts = labels.unique(return_inverse=True, return_counts=True)  # (U,), (B,), (U,)
        with torch.no_grad():
            teacher_u = self.teacher.encode_image(images)  # (B, D), the same augmented images
        dva = visual_text_alignment(dva_u, self.classifier, labels, scale)
        scl = supervised_contrastive(u, t, classes, scale, positive_in_denominator=not self.options.literal_scl)
        vld = similarity_distillation(u, t, teacher_u, self.teacher_text[present], counts, scale)
        return {
            "dva": Term(1.0, dva),
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
