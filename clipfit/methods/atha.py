"""ATHA: fine-tuning while head and tail patch tokens are edited in the forward pass.

"Improving CLIP Adaptation by Breaking Tail Alignment for Source-Free Cross-Domain Few-Shot Learning", arXiv 2605.29776.
The edits themselves are in model/edits.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from clipfit.config.edits import EditSettings
from clipfit.config.options import option
from clipfit.methods.base import Embeddings, Group, LoraDefaults, Method, Seen, ShotCounts, Task, Term

if TYPE_CHECKING:
    from torch import Tensor

    from clipfit.methods.batch import Batch
    from clipfit.model.clip import Texts
    from clipfit.streams import Rows


@dataclass(frozen=True)
class AthaOptions(EditSettings):
    """The edits' settings, the learning rate of their strengths a_l, b_l, and the logits' scale.

    A scale of None is the frozen τ⁻¹ under full fine-tuning; under LoRA the paper's 4, or 2 for one shot a class.
    """

    strength_rate: float = option(1e-3, "Learning rate of the strengths a and b.", above=0)
    logit_scale: float | None = option(
        None, "Fixed scale of the logits.", above=0, default_is="the model's; lora: 4, at one shot 2"
    )


def edit_settings(options: AthaOptions) -> EditSettings:
    """The part of the options that belongs to the model."""
    return EditSettings(**{f.name: getattr(options, f.name) for f in fields(EditSettings)})


def started_strengths(task: Task, options: AthaOptions) -> Group:
    """Strengths at their initial values, to be trained at a rate of their own; by SGD under LoRA, as in the paper."""
    edits = task.clip.edits
    assert edits is not None, "the model of a method that edits tokens is built with its edits"
    edits.start()
    parameters = {"clipfit.head": edits.head, "clipfit.tail": edits.tail}
    if task.tuning == "lora":
        return Group(parameters, options.strength_rate, weight_decay=5e-4, momentum=0.9)
    return Group(parameters, options.strength_rate)


def logit_scale(task: Task, options: AthaOptions) -> Tensor | float:
    """The logits' scale: the one asked for, else τ⁻¹ under full fine-tuning and the paper's 4 or 2 under LoRA."""
    if options.logit_scale is not None:
        return options.logit_scale
    if task.tuning == "full":
        return task.clip.scale
    return 2.0 if task.shots_per_class == 1 else 4.0


def paper_lora(counts: ShotCounts) -> Mapping[str, Any]:
    """The paper's recipe: 100 epochs, the whole support set in one step.

    Images are not cropped at random but seen as in evaluation: of one that is not square, its middle (the paper resizes
    it to a square). Beyond 128 shots, more than the paper ever has, steps are batches.
    """
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    return {"learning_rate": 2e-4, "weight_decay": 0.01, "batch_size": min(counts.in_all, 128), "epochs": 100, **whole}


class Atha:
    """L = CE(softmax_c(τ⁻¹·cos(u_i, t_c)), y_i) over all C classes, u_i edited towards and away from those classes."""

    teacher = None

    def __init__(self, task: Task, options: AthaOptions):
        self.clip, self.tokens = task.clip, task.tokens
        self.groups: tuple[Group, ...] = (started_strengths(task, options),)
        self.scale = logit_scale(task, options)

    def classes(self, batch: Batch) -> Rows:
        return batch.text_rows(len(self.tokens))  # all C

    def embed(self, batch: Batch, texts: Texts) -> Seen:
        return Seen(self.clip.encode_image(batch.images, texts.class_tokens, batch.image_rows))  # (B, D)

    def terms(self, e: Embeddings, batch: Batch) -> dict[str, Term]:
        from torch.nn.functional import cross_entropy

        return {"ce": Term(1.0, cross_entropy(self.scale * e.seen.u @ e.t.T, batch.labels))}


METHOD = Method(
    name="atha",
    summary="fine-tuning with head patches moved towards the class texts and tail patches away from them",
    citation='"Improving CLIP Adaptation by Breaking Tail Alignment for Source-Free Cross-Domain Few-Shot Learning", '
    "arXiv 2605.29776",
    options=AthaOptions,
    build=Atha,
    lora=LoraDefaults(recipe=paper_lora),
    edits=edit_settings,
)
