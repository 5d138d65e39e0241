"""The CITE losses on top of ATHA's forward pass. Nobody has published the two together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clipfit.errors import UsageError
from clipfit.methods.atha import AthaOptions, edit_settings, paper_lora, started_strengths
from clipfit.methods.base import LoraDefaults, Method, Task, Term
from clipfit.methods.cite import Cite, CiteOptions


@dataclass(frozen=True)
class CiteAthaOptions(AthaOptions, CiteOptions):
    """Those of both methods; the losses' scale is always τ⁻¹."""

    def __post_init__(self) -> None:
        AthaOptions.__post_init__(self)
        CiteOptions.__post_init__(self)
        if self.logit_scale is not None:
            raise UsageError("the losses of cite+atha always have the model's own scale: leave logit_scale out.")


class CiteAtha(Cite):
    """L = L_DVA + λ·L_SCL + η·L_VLD of edited images; the teacher is plain CLIP.

    In L_DVA the class tokens are constants, for that term sends no gradient to the text tower: hence a second pass
    through the image tower, with the same values (under LoRA with another dropout mask).
    """

    def __init__(self, task: Task, options: CiteAthaOptions):
        super().__init__(task, options)
        self.extra = (*self.extra, started_strengths(task, options))

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Term]:
        t, z = self.backbone.read(self.tokens)  # (C, D), (C, V): the candidates are all classes
        assert z is not None
        u = self.backbone.encode_image(images, z)  # (B, D)
        dva_u = self.backbone.encode_image(images, z.detach())  # (B, D)
        return self.terms(images, labels, u, dva_u, t[labels.unique()])


METHOD = Method(
    name="cite+atha",
    summary="the losses of cite on images whose patch tokens are edited as in atha",
    citation="arXiv 2407.04003 and arXiv 2605.29776; unpublished in combination",
    options=CiteAthaOptions,
    build=CiteAtha,
    lora=LoraDefaults(recipe=paper_lora),
    edits=edit_settings,
)
