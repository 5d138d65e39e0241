"""A CLIP of open_clip's and what belongs to it: encoding images and texts, and what is attached to it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from clipfit.model import bf16, compat, preprocess, text_tower
from clipfit.model.bf16 import autocast
from clipfit.model.context import word_embeddings
from clipfit.model.edits import Look, TokenEdits, editing, invert_head
from clipfit.model.image_tower import PatchTower, patch_tower
from clipfit.model.lora import Adapters
from clipfit.model.named import Additions, NamedWeights
from clipfit.model.sources import Source
from clipfit.model.tokenizing import tokenizer_of
from clipfit.streams import Rows


class Texts(NamedTuple):
    """Class texts, read once: unit-norm embeddings t (C, D); class tokens z (C, V) where patch tokens are edited."""

    embeddings: torch.Tensor
    class_tokens: torch.Tensor | None


class Clip(NamedWeights):
    """A two-tower model of open_clip's (CLIP or CustomTextCLIP), in evaluation mode, with what belongs to it.

    It stays in that mode during adaptation too: no dropout or stochastic depth, batch-norm statistics as pre-trained.

    What it has beyond open_clip's CLIP is fixed at construction and changes nothing before it is trained. With `edits`
    (ATHA) the features of an image depend on the class texts it is compared with: they are encoded with the class
    tokens of exactly those texts, and never cached across sets of classes.
    """

    def __init__(self, model: compat.Model, source: Source, device: torch.device, additions: Additions | None = None):
        """Raises ModelError or UsageError where the model cannot have the additions."""
        self.model = model.eval().to(device)
        self.source = source
        self.device = device
        self.precision = "fp32"
        self.tower = None
        self.model.logit_scale.requires_grad_(False)  # τ is frozen; tiny batches would ruin it
        if self.model.logit_bias is not None:  # no softmax can train it
            self.model.logit_bias.requires_grad_(False)
        self._tokenizer = tokenizer_of(source)
        # an RGB picture as the model wants it, (3, H, W) uint8; such images → float32 on the device, normalised
        self.geometry = preprocess.geometry(source.preprocess_cfg)
        self.normalize = preprocess.Scale(source.preprocess_cfg, device)
        self.image_size = compat.image_size(model)
        self.additions = additions or Additions()
        self.adapters: Adapters | None = None  # while only these are trained, see lora.adapted
        self.edits = self._new_edits()
        self.context = self._new_context()  # (words, text width)

    def _new_edits(self) -> TokenEdits | None:
        if (settings := self.additions.edits) is None:
            return None
        blocks = len(self.patch_tower.blocks)
        settings = settings.placed(blocks, len(text_tower.blocks(self.model, self.source.model)))
        self.additions = replace(self.additions, edits=settings)
        return TokenEdits(settings, blocks).to(self.device)

    def _new_context(self) -> torch.nn.Parameter | None:
        if (words := self.additions.context) is None:
            return None
        tokens = self.tokenize([words]).to(self.device)
        return torch.nn.Parameter(word_embeddings(self.model, tokens, words, self.source.model))

    @property
    def precision(self) -> str:
        """Of the towers' products, fp32 or bf16; embeddings and losses are float32 always."""
        return self._precision

    @precision.setter
    def precision(self, precision: str) -> None:
        self._precision = precision
        bf16.prepare(self.model, self.device, precision)

    @property
    def embed_dim(self) -> int:
        """D, the width of the joint embedding."""
        return int(self.source.model_cfg["embed_dim"])

    @property
    def patch_tower(self) -> PatchTower:
        """The image tower as one of patch tokens. Raises ModelError where it is none."""
        return patch_tower(self.model, self.source.model)

    def with_additions(self, additions: Additions, copied: bool = False) -> Clip:
        """The same open_clip model, or an independent copy of it, with other additions, which start without effect.

        Raises:
            ModelError, UsageError: the model cannot have them.
        """
        other = Clip(copy.deepcopy(self.model) if copied else self.model, self.source, self.device, additions)
        other.precision = self.precision
        return other

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts → token ids (n, context length) int64, on the CPU, where they are cut with no GPU to wait for."""
        return torch.as_tensor(self._tokenizer(list(texts)))

    def placed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (n, context length) as the text tower takes them: (n, length) on the device, cut before."""
        return text_tower.cut(self.model, tokens).to(self.device, non_blocking=True)

    def encode_image(
        self, images: torch.Tensor, class_tokens: torch.Tensor | None = None, rows: Rows | None = None
    ) -> torch.Tensor:
        """Normalised images (B, 3, H, W) → unit-norm embeddings u (B, D), float32.

        Args:
            class_tokens: (C, V), of the texts that the images are compared with; needed where tokens are edited.
            rows: which images these are; needed in training with adapters, whose dropout goes by it.
        """
        if self.tower is not None:
            return self.tower(images, class_tokens)
        with self.drawing(rows):
            return self._embedded(images, class_tokens, None)

    def _embedded(
        self, images: torch.Tensor, class_tokens: torch.Tensor | None, seen: list[Look] | None
    ) -> torch.Tensor:
        if (class_tokens is None) != (self.edits is None):
            raise ValueError("class tokens belong to a model that edits patch tokens, and only to it")
        changing: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        # without effect, the features are plain CLIP's to the bit in bf16 too: the stream stays what it is
        still = self.edits is not None and not torch.is_grad_enabled() and self.edits.without_effect
        if self.edits and class_tokens is not None and not (still and seen is None):
            changing = editing(self.patch_tower, self.edits, class_tokens, self.scale, seen)
        with autocast(self.device, self.precision), changing:
            features = self.model.encode_image(images)
        return F.normalize(features.float(), dim=1)

    def encode_text(self, tokens: torch.Tensor, rows: Rows | None = None) -> torch.Tensor:
        """Token ids (n, context length) → unit-norm embeddings t (n, D), float32."""
        return self.read(tokens, rows).embeddings

    def read(self, tokens: torch.Tensor, rows: Rows | None = None) -> Texts:
        """Token ids (C, context length) → what the images need of these texts, by one pass through the text tower."""
        t, f = self.text_features(tokens, rows)
        return Texts(t, None if f is None else self.class_tokens(f))

    def text_features(self, tokens: torch.Tensor, rows: Rows | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token ids (C, context length) → t (C, D) of unit norm; f (C, D) of an inner block where tokens are edited."""
        inner_block = self.edits.settings.text_block if self.edits else None
        tokens = self.placed(tokens) if tokens.device.type == "cpu" else tokens
        with self.drawing(rows), autocast(self.device, self.precision):
            features, *inner = text_tower.features(self.model, tokens, self.context, inner_block)
        return F.normalize(features.float(), dim=1), inner[0].float() if inner else None

    def encode(self, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) and the texts (C, context length) they are compared with → u (B, D), t (C, D)."""
        texts = self.read(tokens)
        return self.encode_image(images, texts.class_tokens), texts.embeddings

    def drawing(self, rows: Rows | None) -> contextlib.AbstractContextManager[object]:
        """Within: adapters, where there are any, draw the dropout of these rows."""
        return self.adapters.drawing(rows) if self.adapters else contextlib.nullcontext()

    @torch.no_grad()
    def looks(self, images: torch.Tensor, texts: Texts) -> tuple[torch.Tensor, list[Look]]:
        """Unit-norm embeddings u (B, D), and what every block of the vision transformer goes by in its edit.

        The model must edit tokens; with strengths 0 this is what plain CLIP would go by.
        """
        seen: list[Look] = []
        return self._embedded(images, texts.class_tokens, seen), seen

    def class_tokens(self, features: torch.Tensor) -> torch.Tensor:
        """Text features f (C, D) → class tokens z (C, V), by the vision head of this forward pass."""
        assert self.edits is not None
        with torch.autocast(self.device.type, enabled=False):
            return invert_head(features, self.patch_tower.head, self.edits.settings.class_token_inverse)


class FrozenImageTower:
    """The pre-trained image tower of plain CLIP, as a teacher: no gradient, no edits, and no text tower beside it."""

    def __init__(self, clip: Clip, weights: Mapping[str, torch.Tensor] | None = None):
        """`weights`: the pre-trained θ where it is kept anyway; tensors of the clip's device are used, not copied."""
        self._device, self._precision = clip.device, clip.precision
        pretrained = weights or clip.state()
        shared = {
            id(p): torch.nn.Parameter(_on(pretrained[f"visual.{name}"], clip.device, copied=weights is None), False)
            for name, p in clip.model.visual.named_parameters()
        }
        self.visual = copy.deepcopy(clip.model.visual, shared)
        if self._precision == "bf16":
            bf16.round_products(self.visual)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, H, W) → unit-norm embeddings (B, D), float32."""
        with autocast(self._device, self._precision):
            features = self.visual(images)
        return F.normalize(features.float(), dim=1)


def _on(tensor: torch.Tensor, device: torch.device, copied: bool) -> torch.Tensor:
    return tensor.detach().clone() if copied else tensor.detach().to(device)
