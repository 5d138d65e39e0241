"""Low-rank adapters on the queries, keys and values of every transformer block, merged into plain weights at the end.

LoRA: "Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; on CLIP: CLIP-LoRA, arXiv 2405.18541, and ATHA,
arXiv 2605.29776. q, k and v share one matrix in open_clip's blocks, which keepers of LoRA libraries treat as one
matrix of one rank; the papers adapt each of the three, with a dropout of its own, hence these lines.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from clipfit.config.lora import LoraSettings
from clipfit.errors import ModelError


class LoraAttention(torch.nn.Module):
    """Self-attention with frozen weights W and adapters: (W_j + s·B_j·A_j)·x for j in q, k, v.

    Stands in for an `nn.MultiheadAttention` in a block of open_clip's: batch first, inputs (n, L, width).
    """

    def __init__(self, frozen: torch.nn.MultiheadAttention, settings: LoraSettings, generator: torch.Generator):
        super().__init__()
        self.frozen, self.settings, self.generator = frozen, settings, generator
        width = frozen.embed_dim
        like = frozen.in_proj_weight
        bound = 1 / math.sqrt(width)  # as torch's own linear layers start, and A in the code of both papers
        down = torch.empty(3, settings.rank, width, device=generator.device).uniform_(
            -bound, bound, generator=generator
        )
        self.down = torch.nn.Parameter(down.to(like))  # A
        self.up = torch.nn.Parameter(like.new_zeros(3, width, settings.rank))  # B: the first step starts at CLIP

    def forward(
        self,
        x: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        need_weights: bool,
        attn_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, None]:
        """Called as open_clip's blocks call their attention: key and value are x itself."""
        f = self.frozen
        qkv = F.linear(x, f.in_proj_weight, f.in_proj_bias).unflatten(2, (3, -1))  # (n, L, 3, width)
        low = torch.einsum("jnld,jrd->nljr", self._dropped(x), self.down)
        qkv = qkv + self.settings.scaling * torch.einsum("nljr,jdr->nljd", low, self.up)
        q, k, v = qkv.unflatten(3, (f.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (n, heads, L, head width)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return f.out_proj(seen.transpose(1, 2).flatten(2)), None

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        """The input of the three adapters, (3, n, L, width), with a dropout mask for each."""
        p = self.settings.dropout
        if p == 0 or not torch.is_grad_enabled():
            return x.expand(3, *x.shape)
        kept = torch.rand(3, *x.shape, generator=self.generator, device=x.device) >= p
        return x * kept.to(x) / (1 - p)

    @torch.no_grad()
    def merged(self) -> torch.nn.MultiheadAttention:
        """The attention it stood in for, with W_j + s·B_j·A_j for weights."""
        self.frozen.in_proj_weight.add_(self.settings.scaling * (self.up @ self.down).flatten(0, 1))
        return self.frozen


@contextlib.contextmanager
def adapted(model: Any, settings: LoraSettings, generator: torch.Generator) -> Iterator[None]:
    """Within: a CLIP of which only adapters can be trained. Afterwards: a plain CLIP with the adapters merged."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    attach(model, settings, generator)
    yield
    merge(model)
    for parameter in trainable:
        parameter.requires_grad_(True)


def attach(model: Any, settings: LoraSettings, generator: torch.Generator) -> None:
    """Freeze a CLIP of open_clip's, and put adapters on the attention of every block of both its towers.

    Raises:
        ModelError: a tower that is no transformer, or one whose attention is of another kind.
    """
    model.requires_grad_(False)
    for tower in (getattr(model.visual, "transformer", None), model.transformer):
        for block in getattr(tower, "resblocks", None) or [None]:
            attention = getattr(block, "attn", None)
            if not isinstance(attention, torch.nn.MultiheadAttention):
                raise ModelError(
                    "--tuning lora needs two transformers with plain multi-head attention, but one of this model's "
                    f"towers has {type(attention or model.visual).__name__}: use --tuning full."
                )
            block.attn = LoraAttention(attention, settings, generator)


def merge(model: Any) -> None:
    """Add the adapters to the weights they belong to: what is left is a plain CLIP again, still frozen."""
    for tower in (model.visual.transformer, model.transformer):
        for block in tower.resblocks:
            block.attn = block.attn.merged()
