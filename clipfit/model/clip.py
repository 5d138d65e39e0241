"""A CLIP of open_clip's and what belongs to it: encoding images and texts, what is attached to it."""

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
from open_clip.transformer import VisionTransformer, text_global_pool
from PIL import Image
from torchvision.transforms.functional import normalize, pil_to_tensor

from clipfit.config.edits import EditSettings
from clipfit.errors import ModelError, UsageError, first_line
from clipfit.model.edits import Look, TokenEdits, invert_head, look
from clipfit.model.sources import Source, geometry_of, tokenizer_of

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

    With `edits` attached (ATHA) the features of an image depend on the class texts it is compared with: they are
    encoded with the class tokens of exactly those texts, and never cached across sets of classes.
    """

    def __init__(self, model: open_clip.CLIP, source: Source, device: torch.device):
        self.model = model.eval().to(device)
        self.source = source
        self.device = device
        self.precision = "fp32"  # of the towers; embeddings and losses are float32 always
        self.edits: TokenEdits | None = None
        self.context: torch.nn.Parameter | None = None  # (words, text width)
        self.additions = Additions()
        self.model.logit_scale.requires_grad_(False)  # τ is frozen; tiny batches would ruin it
        self._tokenizer = tokenizer_of(source)
        self._geometry = geometry_of(source)
        size = model.visual.image_size
        self.image_size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)

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
        rows, columns = self.model.visual.grid_size
        return int(rows), int(columns)

    @property
    def bytes(self) -> int:
        """What the weights take on disk."""
        return sum(t.numel() * t.element_size() for t in self.state().values())

    def state(self) -> dict[str, torch.Tensor]:
        """θ: parameters and buffers by open_clip's names, then what is attached; detached, not copied."""
        return {name: tensor.detach() for name, tensor in {**self.model.state_dict(), **self._added()}.items()}

    def snapshot(self) -> dict[str, torch.Tensor]:
        """θ as it is now, copied."""
        return {name: tensor.clone() for name, tensor in self.state().items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set θ.

        Raises:
            ModelError: the names or shapes are not those of this architecture with what is attached to it.
        """
        added = self._added()
        try:
            found = {name for name in state if name.startswith(ADDED)}
            if found != added.keys():
                raise RuntimeError(f"expected beside open_clip's tensors {sorted(added)}, found {sorted(found)}")
            self.model.load_state_dict({name: t for name, t in state.items() if name not in added})
            with torch.no_grad():
                for name, tensor in added.items():
                    tensor.copy_(state[name])
        except RuntimeError as error:
            raise ModelError(f"the weights do not fit {self.source.model}: {first_line(error)}.") from error

    def _added(self) -> dict[str, torch.Tensor]:
        added = dict(self.edits.state_dict(prefix=ADDED)) if self.edits else {}
        return added if self.context is None else {**added, f"{ADDED}context": self.context}

    def attach(self, additions: Additions) -> None:
        """From now on edit patch tokens and read context vectors; both so that nothing changes before they are trained.

        Raises:
            ModelError: edits of an image tower that is not open_clip's own vision transformer or pools in another way;
                context vectors of a text tower that pools elsewhere than at the end of the text.
            UsageError: the settings name a block that the model does not have, or there are no context words.
        """
        if additions.edits:
            visual = self.model.visual
            if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
                raise ModelError(
                    "token editing needs the patch tokens and the linear head of open_clip's vision transformer, but "
                    f"the image tower of {self.source.model} is {_kind(visual)}: take a ViT."
                )
            blocks = len(visual.transformer.resblocks)
            placed = additions.edits.placed(blocks, len(self.model.transformer.resblocks))
            self.edits = TokenEdits(placed, blocks).to(self.device)
            additions = replace(additions, edits=placed)
        if additions.context is not None and self.context is None:
            self.context = torch.nn.Parameter(self._word_embeddings(additions.context).clone())
        self.additions = replace(additions, context=additions.context or self.additions.context)

    def _word_embeddings(self, words: str) -> torch.Tensor:
        """The pre-trained embeddings of words that a text begins with: (tokens, text width)."""
        if self.model.text_pool_type not in ("argmax", "eos"):
            raise ModelError(
                "context vectors need texts that are read at their end-of-text token, but the text tower of "
                f"{self.source.model} pools by {self.model.text_pool_type!r}: leave --context out."
            )
        if words[-1:].isalnum():
            raise UsageError("context vectors stand for whole words, but the template's run into the class name.")
        tokens = self.tokenize([words])[0]
        count = int(self._ends(tokens[None])) - 1  # between start and end of the text
        if count < 1:
            raise UsageError("context vectors stand for words before the class name, but the template has none there.")
        embeddings: torch.Tensor = self.model.token_embedding(tokens[1 : 1 + count]).detach()
        return embeddings

    def require_plain(self, what: str) -> None:
        """Take off again what is attached, for what can only hold a plain CLIP.

        Raises:
            UsageError: it is in effect: without it this would be another model.
        """
        edited = self.edits is not None and any(bool(strengths.any()) for strengths in self.edits.parameters())
        learnt = self.context is not None and not torch.equal(
            self.context, self._word_embeddings(str(self.additions.context))
        )
        if edited or learnt:
            raise UsageError(
                f"{what} cannot hold {'edits of patch tokens' if edited else 'context vectors'}, and without them it "
                "would be another model: use the run itself, or --alpha 0."
            )
        self.edits, self.context, self.additions = None, None, Additions()

    def plain_copy(self) -> Clip:
        """An independent copy of the plain CLIP, nothing attached."""
        copied = copy.copy(self)
        copied.model = copy.deepcopy(self.model)
        copied.edits, copied.context, copied.additions = None, None, Additions()
        return copied

    def frozen_copy(self) -> Clip:
        """A plain copy whose weights never get a gradient."""
        copied = self.plain_copy()
        copied.model.requires_grad_(False)
        return copied

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts → token ids (n, context length) int64."""
        tokens: torch.Tensor = self._tokenizer(list(texts))
        return tokens.to(self.device)

    def encode_image(self, images: torch.Tensor, class_tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised images (B, 3, H, W) → unit-norm embeddings u (B, D), float32.

        Args:
            class_tokens: (C, V), of the texts that the images are compared with; needed where tokens are edited.
        """
        if (class_tokens is None) != (self.edits is None):
            raise ValueError("class tokens belong to a model that edits patch tokens, and only to it")
        with self._autocast(), self._editing(class_tokens):
            features = self.model.encode_image(images)
        return F.normalize(features.float(), dim=1)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (n, context length) → unit-norm embeddings t (n, D), float32."""
        return self.read(tokens).embeddings

    def read(self, tokens: torch.Tensor) -> Texts:
        """Token ids (C, context length) → what the images need of these texts, by one pass through the text tower."""
        with self._autocast():
            features, *inner = self._text_features(tokens)
        t = F.normalize(features.float(), dim=1)
        return Texts(t, self._class_tokens(inner[0].float()) if inner else None)

    def encode(self, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) and the texts (C, context length) they are compared with → u (B, D), t (C, D)."""
        texts = self.read(tokens)
        return self.encode_image(images, texts.class_tokens), texts.embeddings

    @torch.no_grad()
    def looks(self, images: torch.Tensor, texts: Texts) -> tuple[torch.Tensor, list[Look]]:
        """Unit-norm embeddings u (B, D), and what every block of the vision transformer goes by in its edit.

        The model must edit tokens; with strengths 0 this is what plain CLIP would go by.
        """
        assert self.edits is not None
        assert texts.class_tokens is not None
        ratios, seen = (self.edits.settings.head_ratio, self.edits.settings.tail_ratio), list[Look]()
        watch = lambda _module, args: seen.append(look(args[0][:, 1:], texts.class_tokens, *ratios))  # noqa: E731
        handles = [block.register_forward_pre_hook(watch) for block in self.model.visual.transformer.resblocks]
        try:
            return self.encode_image(images, texts.class_tokens), seen
        finally:
            for handle in handles:
                handle.remove()

    def _text_features(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Text features (n, D) of the last block, then, where tokens are edited, of the intermediate one.

        Under a causal mask nothing behind the end-of-text token can change its features, so the sequence is cut
        behind the longest one; exact, and several times faster for class names. open_clip's `encode_text` refuses a
        shorter sequence, hence these lines.
        """
        m = self.model
        if m.attn_mask is not None and m.text_pool_type in ("argmax", "eos"):
            tokens = tokens[:, : int(self._ends(tokens).max()) + 1]
        length, dtype = tokens.shape[1], m.transformer.get_cast_dtype()
        mask = None if m.attn_mask is None else m.attn_mask[:length, :length]
        x = m.token_embedding(tokens).to(dtype)  # (n, length, width)
        if self.context is not None:
            words = self.context.to(dtype).expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], words, x[:, 1 + words.shape[1] :]], 1)
        x = x + m.positional_embedding[:length].to(dtype)
        if self.edits is None:
            outputs = [m.transformer(x, attn_mask=mask)]  # (n, length, width)
        else:
            last, inner = m.transformer.forward_intermediates(
                x, attn_mask=mask, indices=[self.edits.settings.text_block]
            )
            outputs = [last, *inner]
        return [
            self._project(text_global_pool(m.ln_final(h), tokens, m.text_pool_type, m.text_eos_id)) for h in outputs
        ]

    def _ends(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where the first end-of-text of each row stands: (n,)."""
        eos = self.model.text_eos_id if self.model.text_pool_type == "eos" else tokens.amax(1, keepdim=True)
        return (tokens == eos).int().argmax(1)

    def _project(self, features: torch.Tensor) -> torch.Tensor:
        projection = self.model.text_projection
        if projection is None:
            return features
        out: torch.Tensor = projection(features) if isinstance(projection, torch.nn.Linear) else features @ projection
        return out

    def _class_tokens(self, features: torch.Tensor) -> torch.Tensor:
        """Text features (C, D) → class tokens z (C, V), by the vision head of this forward pass."""
        assert self.edits is not None
        head = self.model.visual
        with torch.autocast(self.device.type, enabled=False):
            return invert_head(
                features, head.proj, head.ln_post.weight, head.ln_post.bias, self.edits.settings.class_token_inverse
            )

    @contextlib.contextmanager
    def _editing(self, class_tokens: torch.Tensor | None) -> Iterator[None]:
        """Edit the patch tokens before every block of the vision transformer; the class token stays as it is."""
        if class_tokens is None:
            yield
            return
        handles = [
            block.register_forward_pre_hook(functools.partial(self._edit, number, class_tokens))
            for number, block in enumerate(self.model.visual.transformer.resblocks)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _edit(self, block: int, class_tokens: torch.Tensor, _module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self.edits is not None
        x, *rest = args  # (B, 1 + L, V)
        with torch.autocast(self.device.type, enabled=False):  # a ranking in bf16 would be one of ties
            patches = self.edits(x[:, 1:], class_tokens, block, self.scale)
        return (torch.cat([x[:, :1], patches], 1), *rest)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

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


def _kind(visual: torch.nn.Module) -> str:
    trunk = getattr(visual, "trunk", visual)
    pooled = " with attentional pooling" if isinstance(visual, VisionTransformer) else ""
    return f"a {type(trunk).__name__}{pooled}"
