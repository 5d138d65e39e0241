"""Stand-ins for versions of open_clip that the tests run without."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import Attention, ResidualAttentionBlock

Tensor = torch.Tensor


class Attention4(Attention):
    """open_clip 4's attention, as far as blocks of CLIP use it: key and value by name, a tensor in return.

    Tensors have the names and shapes of `nn.MultiheadAttention`, as there.
    """

    def __init__(self, before: torch.nn.MultiheadAttention):
        super().__init__(before.embed_dim, before.num_heads)
        self.load_state_dict(before.state_dict())

    def forward(
        self, x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Tokens (n, L, width) → (n, L, width)."""
        (wq, wk, wv), (bq, bk, bv) = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = F.linear(x, wq, bq), F.linear(x if k_x is None else k_x, wk, bk), F.linear(
            x if v_x is None else v_x, wv, bv
        )  # fmt: skip
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (len(x), self.num_heads))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(seen.transpose(1, 2).flatten(2))


def as_version_4(model: torch.nn.Module) -> torch.nn.Module:
    """The model, its blocks' attention of version 4's class and called as version 4 calls it; in version 4 as it is."""
    for block in [module for module in model.modules() if isinstance(module, ResidualAttentionBlock)]:
        if isinstance(block.attn, torch.nn.MultiheadAttention):
            block.attn = Attention4(block.attn)
            block.attention = functools.partial(_attention_4, block)
    return model


def _attention_4(
    block: Any, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
) -> Tensor:
    mask = None if attn_mask is None else attn_mask.to(q_x.dtype)
    return block.attn(q_x, k_x=q_x if k_x is None else k_x, v_x=q_x if v_x is None else v_x, attn_mask=mask)
