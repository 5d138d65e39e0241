"""Text towers: open_clip's own, in a CLIP or beside it, and those of the transformers library.

Names are long and class names short: columns behind the longest text are left out wherever that changes no feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import text_global_pool

from clipfit.errors import ModelError

Tensor = torch.Tensor


@dataclass(frozen=True)
class TextTower:
    """A text transformer of open_clip's own: `parts` has its layers, be it the CLIP itself or a tower beside it.

    whole: it does more than its layers say (a class token, a mask of the padding), and is called as a whole.
    """

    parts: Any
    pool: str  # which token's features are those of the text: first, last, argmax, eos
    eos: int | None
    whole: bool

    @property
    def pools_at_end(self) -> bool:
        """Whether a text's features are those of its end-of-text token."""
        return self.pool in ("argmax", "eos") and not self.whole

    @property
    def trims(self) -> bool:
        """Whether what stands behind the end of a text changes nothing: it sees what comes before it alone."""
        return self.pools_at_end and self.parts.attn_mask is not None

    def ends(self, tokens: Tensor) -> Tensor:
        """Where the end of each text stands: token ids (n, context length) → (n,) int64."""
        eos = tokens.new_tensor(self.eos) if self.pool == "eos" else tokens.amax(1, keepdim=True)
        return (tokens == eos).int().argmax(1)


def own(model: Any) -> TextTower | None:
    """The text tower of a model, where it is one of open_clip's own."""
    text = getattr(model, "text", None)
    if text is None:
        return TextTower(model, model.text_pool_type, model.text_eos_id, False)
    if isinstance(text, HFTextEncoder) or not hasattr(text, "token_embedding"):
        return None
    more = getattr(text, "cls_emb", None) is not None or bool(getattr(text, "use_pad_mask", False))
    return TextTower(text, text.pool_type, text.eos_id, more)


def require_own(model: Any, name: str, what: str) -> TextTower:
    """Raises ModelError for a text tower of another library, or one that is called as a whole."""
    tower = own(model)
    if tower is not None and not tower.whole:
        return tower
    kind = type(getattr(model.text, "transformer", model.text)).__name__
    raise ModelError(
        f"{what} needs a text tower of open_clip's own, whose blocks can be read one by one, but that of {name} is a "
        f"{kind}: take a model such as ViT-B-16."
    )


def blocks(model: Any, name: str) -> Sequence[torch.nn.Module]:
    """The blocks of a text tower of open_clip's own. Raises ModelError for another one."""
    resblocks: Sequence[torch.nn.Module] = require_own(model, name, "token editing").parts.transformer.resblocks
    return resblocks


def trims(model: Any) -> bool:
    """Whether texts may be cut behind the longest one's end: told by pooling, mask and padding, not by names."""
    tower = own(model)
    return tower.trims if tower else _masks_padding(model.text)


def cut(model: Any, tokens: Tensor) -> Tensor:
    """Token ids (n, context length) without the columns behind the longest text's end, where that changes nothing.

    Under a causal mask nothing behind the end-of-text token can change its features. A tower of the transformers
    library gives its padding no weight, in attention and in pooling. Several times faster for class names.
    """
    tower = own(model)
    if tower:
        return tokens[:, : int(tower.ends(tokens).max()) + 1] if tower.trims else tokens
    if not _masks_padding(model.text):
        return tokens
    used = (tokens != model.text.config.pad_token_id).any(0).nonzero()
    return tokens[:, : int(used.max()) + 1] if len(used) else tokens


def _masks_padding(text: Any) -> bool:
    """Whether padding has no weight: not in attention (told so by HFTextEncoder), nor in the pooling."""
    return isinstance(text, HFTextEncoder) and type(text.pooler).__name__ in (
        "MeanPooler", "MaxPooler", "ClsPooler", "ClsLastHiddenStatePooler",
    )  # fmt: skip


def features(model: Any, tokens: Tensor, context: Tensor | None, inner_block: int | None) -> list[Tensor]:
    """Text features (n, D) of the last block, then of block `inner_block` through the same norm and projection.

    open_clip's `encode_text` of a CLIP refuses a shorter sequence than the full context, hence these lines.

    Args:
        tokens: (n, length) token ids; length at most the context's. context: (words, width), embeddings that stand in
            place of those of the first tokens behind the start of the text. Both need a tower of open_clip's own.
    """
    tower = own(model)
    if tower is None or tower.whole:
        assert context is None
        assert inner_block is None
        return [model.encode_text(tokens)]
    text = tower.parts
    length, dtype = tokens.shape[1], text.transformer.get_cast_dtype()
    mask = None if text.attn_mask is None else text.attn_mask[:length, :length]
    x = text.token_embedding(tokens).to(dtype)  # (n, length, width)
    if context is not None:
        words = context.to(dtype).expand(x.shape[0], -1, -1)
        x = torch.cat([x[:, :1], words, x[:, 1 + words.shape[1] :]], 1)
    x = x + text.positional_embedding[:length].to(dtype)
    if inner_block is None:
        outputs = [text.transformer(x, attn_mask=mask)]  # (n, length, width)
    else:
        last, inner = text.transformer.forward_intermediates(x, attn_mask=mask, indices=[inner_block])
        outputs = [last, *inner]
    pooled = (text_global_pool(text.ln_final(h), tokens, tower.pool, tower.eos) for h in outputs)
    return [_projected(text.text_projection, one) for one in pooled]


def _projected(projection: Any, pooled: Tensor) -> Tensor:
    if projection is None:
        return pooled
    out: Tensor = projection(pooled) if isinstance(projection, torch.nn.Linear) else pooled @ projection
    return out
