"""The CITE losses on top of ATHA's forward pass. Nobody has published the two together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipfit.errors import UsageError
from clipfit.methods.atha import AthaOptions, edit_settings, paper_lora, started_strengths
from clipfit.methods.base import Embeddings, LoraDefaults, Method, Seen, Task, Term
from clipfit.methods.cite import Cite, CiteOptions

if TYPE_CHECKING:
    from clipfit.methods.batch import Batch
    from clipfit.model.clip import Texts
    from clipfit.streams import Rows


@dataclass(frozen=True)
class CiteAthaOptions(AthaOptions, CiteOptions):
    """Those of both methods; the losses' scale is always τ⁻¹."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.logit_scale is not None:
            raise UsageError("the losses of cite+atha always have the model's own scale: leave logit_scale out.")


class CiteAtha(Cite):
    """L = L_DVA + λ·L_SCL + η·L_VLD of edited images; the teacher is plain CLIP.

    In L_DVA the class tokens are constants, for that term sends no gradient to the text tower: hence a second pass
    through the image tower, with the same values.
    """

    def __init__(self, task: Task, options: CiteAthaOptions):
        super().__init__(task, options)
        self.groups = (*self.groups, started_strengths(task, options))

    def classes(self, batch: Batch) -> Rows:
        return batch.text_rows(len(self.tokens))  # all C are what an image is edited by

    def embed(self, batch: Batch, texts: Texts) -> Seen:
        z = texts.class_tokens  # (C, V)
        assert z is not None
        u = self.clip.encode_image(batch.images, z, batch.image_rows)  # (B, D)
        return Seen(u, dva_u=self.clip.encode_image(batch.images, z.detach(), batch.image_rows))  # (B, D)

    def terms(self, e: Embeddings, batch: Batch) -> dict[str, Term]:
        return super().terms(e._replace(t=e.t[batch.present]), batch)


METHOD = Method(
    name="cite+atha",
    summary="the losses of cite on images whose patch tokens are edited as in atha",
    citation="arXiv 2407.04003 and arXiv 2605.29776; unpublished in combination",
    options=CiteAthaOptions,
    build=CiteAtha,
    lora=LoraDefaults(recipe=paper_lora),
    edits=edit_settings,
)
