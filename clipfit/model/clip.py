"""A CLIP of open_clip's and what belongs to it: encoding images and texts, and what is attached to it."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import normalize, pil_to_tensor

from clipfit.config.edits import EditSettings
from clipfit.errors import ModelError, first_line
from clipfit.model import compat
from clipfit.model.context import word_embeddings
from clipfit.model.edits import Look, TokenEdits, invert_head, look
from clipfit.model.lora import Adapters
from clipfit.model.sources import Source, geometry_of, tokenizer_of
from clipfit.streams import Rows

ADDED = "clipfit."  # before the names of tensors that open_clip's CLIP does not have


@dataclass(frozen=True)
class Additions:
    """What a model has beyond open_clip's CLIP: edits of patch tokens (ATHA), and learnt vectors for context words.

    context: the words before the class name, in whose embeddings' place the vectors stand.
    """

    edits: EditSettings | None = None
    context: str | None = None


class Texts(NamedTuple):
    """Class texts, read once: unit-norm embeddings t (C, D); class tokens z (C, V) where patch tokens are edited."""

    embeddings: torch.Tensor
    class_tokens: torch.Tensor | None


class Clip:
    """A CLIP of open_clip's `CLIP` class (ViT or ResNet), in evaluation mode, with what belongs to it.

    The model stays in evaluation mode during adaptation too: dropout off, batch-norm statistics as pre-trained.

    What it has beyond open_clip's CLIP is fixed at construction and changes nothing before it is trained. With `edits`
    (ATHA) the features of an image depend on the class texts it is compared with: they are encoded with the class
    tokens of exactly those texts, and never cached across sets of classes.
    """

    def __init__(self, model: open_clip.CLIP, source: Source, device: torch.device, additions: Additions | None = None):
        """Raises ModelError or UsageError where the model cannot have the additions."""
        self.model = model.eval().to(device)
        self.source = source
        self.device = device
        self.precision = "fp32"  # of the towers; embeddings and losses are float32 always
        self.model.logit_scale.requires_grad_(False)  # τ is frozen; tiny batches would ruin it
        self._tokenizer = tokenizer_of(source)
        self._geometry = geometry_of(source)
        self.image_size = compat.image_size(model)
        self.additions = additions or Additions()
        self.adapters: Adapters | None = None  # while only these are trained, see lora.adapted
        self.edits = self._new_edits()
        self.context = self._new_context()  # (words, text width)

    def _new_edits(self) -> TokenEdits | None:
        settings = self.additions.edits
        if settings is None:
            return None
        compat.require_patch_tokens(self.model, self.source.model)
        blocks = len(compat.image_blocks(self.model))
        settings = settings.placed(blocks, len(compat.text_blocks(self.model)))
        self.additions = replace(self.additions, edits=settings)
        return TokenEdits(settings, blocks).to(self.device)

    def _new_context(self) -> torch.nn.Parameter | None:
        words = self.additions.context
        if words is None:
            return None
        return torch.nn.Parameter(word_embeddings(self.model, self.tokenize([words]), words, self.source.model))

    @property
    def scale(self) -> torch.Tensor:
        """τ⁻¹ = exp(logit_scale): a scalar."""
        return self.model.logit_scale.detach().exp().reshape(())

    @property
    def embed_dim(self) -> int:
        """D, the width of the joint embedding."""
        return int(self.source.model_cfg["embed_dim"])

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a vision transformer."""
        return compat.patch_grid(self.model)

    @property
    def bytes(self) -> int:
        """What the weights take on disk."""
        return sum(t.numel() * t.element_size() for t in self.state().values())

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Every parameter by the name it has on disk: open_clip's, then what is attached."""
        edits = self.edits.named_parameters(prefix=ADDED.rstrip(".")) if self.edits else ()
        context = {} if self.context is None else {f"{ADDED}context": self.context}
        return {**dict(self.model.named_parameters()), **dict(edits), **context}

    def state(self) -> dict[str, torch.Tensor]:
        """θ: parameters and buffers by open_clip's names, then what is attached; detached, not copied."""
        added = {name: p for name, p in self.named_parameters().items() if name.startswith(ADDED)}
        return {name: tensor.detach() for name, tensor in {**self.model.state_dict(), **added}.items()}

    def snapshot(self, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        """θ as it is now, copied; to another device where one is named."""
        return {name: tensor.to(device or self.device, copy=True) for name, tensor in self.state().items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set θ.

        Raises:
            ModelError: the names or shapes are not those of this architecture with what is attached to it.
        """
        own = {name: t for name, t in state.items() if not name.startswith(ADDED)}
        attached = {name: p for name, p in self.named_parameters().items() if name.startswith(ADDED)}
        try:
            if (found := state.keys() - own.keys()) != attached.keys():
                raise RuntimeError(f"expected beside open_clip's tensors {sorted(attached)}, found {sorted(found)}")
            self.model.load_state_dict(own)
            with torch.no_grad():
                for name, parameter in attached.items():
                    parameter.copy_(state[name])
        except RuntimeError as error:
            raise ModelError(f"the weights do not fit {self.source.model}: {first_line(error)}.") from error

    def with_additions(self, additions: Additions) -> Clip:
        """The same open_clip model (not copied) with other additions, which start without effect.

        Raises:
            ModelError, UsageError: the model cannot have them.
        """
        other = Clip(self.model, self.source, self.device, additions)
        other.precision = self.precision
        return other

    def copied(self, additions: Additions) -> Clip:
        """An independent copy of the open_clip model with the given additions, which start without effect."""
        other = Clip(copy.deepcopy(self.model), self.source, self.device, additions)
        other.precision = self.precision
        return other

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts → token ids (n, context length) int64."""
        tokens: torch.Tensor = self._tokenizer(list(texts))
        return tokens.to(self.device)

    def encode_image(
        self, images: torch.Tensor, class_tokens: torch.Tensor | None = None, rows: Rows | None = None
    ) -> torch.Tensor:
        """Normalised images (B, 3, H, W) → unit-norm embeddings u (B, D), float32.

        Args:
            class_tokens: (C, V), of the texts that the images are compared with; needed where tokens are edited.
            rows: which images these are; needed in training with adapters, whose dropout goes by it.
        """
        with self._drawing(rows):
            return self._embedded(images, class_tokens, None)

    def _embedded(
        self, images: torch.Tensor, class_tokens: torch.Tensor | None, seen: list[Look] | None
    ) -> torch.Tensor:
        if (class_tokens is None) != (self.edits is None):
            raise ValueError("class tokens belong to a model that edits patch tokens, and only to it")
        # without effect, the features are plain CLIP's to the bit in bf16 too: the stream stays what it is
        still = self.edits is not None and not torch.is_grad_enabled() and self.edits.without_effect
        if class_tokens is None or (still and seen is None):
            editing: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        else:
            editing = self._editing(class_tokens, seen)
        with autocast(self.device, self.precision), editing:
            features = self.model.encode_image(images)
        return F.normalize(features.float(), dim=1)

    def encode_text(self, tokens: torch.Tensor, rows: Rows | None = None) -> torch.Tensor:
        """Token ids (n, context length) → unit-norm embeddings t (n, D), float32."""
        return self.read(tokens, rows).embeddings

    def read(self, tokens: torch.Tensor, rows: Rows | None = None) -> Texts:
        """Token ids (C, context length) → what the images need of these texts, by one pass through the text tower."""
        inner_block = self.edits.settings.text_block if self.edits else None
        with self._drawing(rows), autocast(self.device, self.precision):
            features, *inner = compat.text_features(
                self.model, compat.cut(self.model, tokens), self.context, inner_block
            )
        t = F.normalize(features.float(), dim=1)
        return Texts(t, self._class_tokens(inner[0].float()) if inner else None)

    def encode(
        self,
        images: torch.Tensor,
        tokens: torch.Tensor,
        image_rows: Rows | None = None,
        text_rows: Rows | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) and the texts (C, context length) they are compared with → u (B, D), t (C, D)."""
        texts = self.read(tokens, text_rows)
        return self.encode_image(images, texts.class_tokens, image_rows), texts.embeddings

    def _drawing(self, rows: Rows | None) -> contextlib.AbstractContextManager[object]:
        return self.adapters.drawing(rows) if self.adapters else contextlib.nullcontext()

    @torch.no_grad()
    def looks(self, images: torch.Tensor, texts: Texts) -> tuple[torch.Tensor, list[Look]]:
        """Unit-norm embeddings u (B, D), and what every block of the vision transformer goes by in its edit.

        The model must edit tokens; with strengths 0 this is what plain CLIP would go by.
        """
        seen: list[Look] = []
        return self._embedded(images, texts.class_tokens, seen), seen

    def _class_tokens(self, features: torch.Tensor) -> torch.Tensor:
        """Text features (C, D) → class tokens z (C, V), by the vision head of this forward pass."""
        assert self.edits is not None
        with torch.autocast(self.device.type, enabled=False):
            return invert_head(features, *compat.head(self.model), self.edits.settings.class_token_inverse)

    @contextlib.contextmanager
    def _editing(self, class_tokens: torch.Tensor, seen: list[Look] | None) -> Iterator[None]:
        """Within: patch tokens are edited before every block; the class token stays as it is.

        Args:
            seen: takes what every block's edit goes by, as its tokens come to it.
        """
        blocks = compat.image_blocks(self.model)
        handles = [
            block.register_forward_pre_hook(functools.partial(self._edit, number, class_tokens, seen))
            for number, block in enumerate(blocks)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _edit(
        self, block: int, class_tokens: torch.Tensor, seen: list[Look] | None, _module: Any, args: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        assert self.edits is not None
        x, *rest = args  # (B, 1 + L, V)
        settings = self.edits.settings
        if seen is not None:
            seen.append(look(x[:, 1:], class_tokens, settings.head_ratio, settings.tail_ratio))
        with torch.autocast(self.device.type, enabled=False):  # a ranking in bf16 would be one of ties
            patches = self.edits(x[:, 1:], class_tokens, block, self.scale)
        # float32 from here on: open_clip's blocks add their bf16 products to it, and its norms keep the type they get
        return (torch.cat([x[:, :1].float(), patches], 1), *rest)

    def geometry(self, picture: Image.Image) -> torch.Tensor:
        """An RGB picture resized and cropped as the model wants it: (3, H, W) uint8."""
        for step in self._geometry:
            picture = step(picture)
        tensor: torch.Tensor = pil_to_tensor(picture)
        return tensor

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, 3, H, W) → float32 on the model's device, by the model's mean and standard deviation."""
        cfg = self.source.preprocess_cfg
        out: torch.Tensor = normalize(images.to(self.device).float() / 255, cfg["mean"], cfg["std"])
        return out


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

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, H, W) → unit-norm embeddings (B, D), float32."""
        with autocast(self._device, self._precision):
            features = self.visual(images)
        return F.normalize(features.float(), dim=1)


def _on(tensor: torch.Tensor, device: torch.device, copied: bool) -> torch.Tensor:
    return tensor.detach().clone() if copied else tensor.detach().to(device)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """The towers' products in bf16 where asked for."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
