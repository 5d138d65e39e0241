"""Where the blocks of both towers make queries, keys and values: by which layers, and whether adapters fit there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from open_clip.transformer import Attention
from torch import nn

from clipfit.model import text_tower

QKV = (0, 1, 2)


class Projection(NamedTuple):
    """`owner.name` makes those of q, k, v (0, 1, 2) that `parts` says: a Linear, or a whole attention."""

    owner: nn.Module
    name: str
    parts: tuple[int, ...]


def towers(model: Any) -> dict[str, Sequence[Any]]:
    """The blocks of both towers; none where a tower is no transformer of open_clip's or timm's."""
    text = text_tower.own(model)
    return {
        "image": image_blocks(model.visual),
        "text": getattr(text.parts.transformer, "resblocks", ()) if text else (),
    }


def image_blocks(visual: Any) -> Sequence[Any]:
    """Those of an image tower alone."""
    trunk = getattr(visual, "trunk", None)
    if trunk is not None:
        return getattr(trunk, "blocks", ())
    return getattr(getattr(visual, "transformer", None), "resblocks", ())


def tower_of(model: Any, name: str) -> nn.Module:
    """The tower itself, for what is said of it."""
    tower: nn.Module = model.visual if name == "image" else getattr(model, "text", model)
    return getattr(tower, "trunk", tower) if name == "image" else getattr(tower, "transformer", tower)


def projections(block: Any) -> list[Projection]:
    """Where a block makes q, k and v of its tokens; none where that is not plain: adapters would compute another model.

    torch's attention and open_clip's hold one matrix; timm's have a layer of three parts, or three layers.
    """
    attn = getattr(block, "attn", None)
    if isinstance(attn, nn.MultiheadAttention) or (isinstance(attn, Attention) and _plain(attn)):
        return [Projection(block, "attn", QKV)]
    if attn is None or getattr(attn, "q_bias", None) is not None:  # added by hand, past the layer (EVA-01, EVA-02-E)
        return []
    layers = [("qkv", QKV)] if _linear(attn, "qkv") else [("q_proj", (0,)), ("k_proj", (1,)), ("v_proj", (2,))]
    return [Projection(attn, name, parts) for name, parts in layers] if all(_linear(attn, n) for n, _ in layers) else []


def _linear(attn: nn.Module, name: str) -> bool:
    return isinstance(getattr(attn, name, None), nn.Linear)


def _plain(attn: Attention) -> bool:
    """Whether open_clip's own attention does what torch's does: none of its options is taken."""
    norms = [getattr(attn, name, None) for name in ("ln_q", "ln_k", "ln_inner")]
    scales = [getattr(attn, name, None) for name in ("logit_scale", "head_scale")]
    return all(isinstance(norm, (nn.Identity, type(None))) for norm in norms) and scales == [None, None]
