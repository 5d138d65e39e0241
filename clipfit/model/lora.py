"""Low-rank adapters on the queries, keys and values of every transformer block, merged into plain weights at the end.

LoRA: "Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; on CLIP: CLIP-LoRA, arXiv 2405.18541, and ATHA,
arXiv 2605.29776. q, k and v share one matrix in open_clip's blocks, which keepers of LoRA libraries treat as one
matrix of one rank; the papers adapt each of the three, with a dropout of its own, hence these lines.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from clipfit import streams
from clipfit.config.lora import LoraSettings
from clipfit.errors import ModelError
from clipfit.model import compat
from clipfit.streams import Rows

if TYPE_CHECKING:
    from clipfit.model.clip import Clip

TOWERS = ("image", "text")


class Adapters:
    """What the adapters of all blocks share: their settings, and which random numbers they draw.

    A dropout mask follows from the seed, the step, the tower's block and the number of the image or class it is for,
    so that any part of a batch, or any process, can draw its own.
    """

    def __init__(self, settings: LoraSettings, seed: int, device: torch.device):
        self.settings, self._seed, self._device = settings, seed, device
        self._rows: Rows | None = None

    @contextlib.contextmanager
    def drawing(self, rows: Rows | None) -> Iterator[None]:
        """Within: masks are those of these rows."""
        before, self._rows = self._rows, rows
        try:
            yield
        finally:
            self._rows = before

    def mask(self, tower: str, block: int, length: int, width: int) -> torch.Tensor:
        """Which inputs of q, k, v are kept: (3, n, length, width) bool, for the n rows at hand."""
        if self._rows is None:
            raise ValueError("adapters with dropout need to know which images or classes they are trained on")
        step, numbers = self._rows
        # position by position: a text that is cut shorter draws the same numbers; on a GPU these depend on how many are
        # drawn in all, hence always so many that every text fits
        drawn_length = length if self._device.type == "cpu" else math.ceil(length / 128) * 128
        streams_of_rows = (self._stream(f"{tower} dropout", step, block, number) for number in numbers)
        drawn = [torch.rand(drawn_length, 3, width, generator=g, device=g.device)[:length] for g in streams_of_rows]
        return torch.stack(drawn).permute(2, 0, 1, 3) >= self.settings.dropout

    def started(self, tower: str, block: int, shape: tuple[int, ...]) -> torch.Tensor:
        """A at the start: uniform within 1/√width, as torch's own linear layers start, and A in both papers' code."""
        bound = 1 / math.sqrt(shape[-1])
        generator = self._stream("adapters", TOWERS.index(tower), block)
        return torch.empty(shape, device=self._device).uniform_(-bound, bound, generator=generator)

    def _stream(self, purpose: str, *index: int) -> torch.Generator:
        return streams.generator(self._seed, purpose, *index, device=self._device)


class LoraAttention(torch.nn.Module):
    """Self-attention with frozen weights W and adapters: (W_j + s·B_j·A_j)·x for j in q, k, v.

    Stands in for an `nn.MultiheadAttention` in a block of open_clip's: batch first, inputs (n, L, width).
    """

    def __init__(self, frozen: torch.nn.MultiheadAttention, adapters: Adapters, tower: str, block: int):
        super().__init__()
        self.frozen, self.adapters, self.tower, self.block = frozen, adapters, tower, block
        self.settings = adapters.settings
        width, like = frozen.embed_dim, frozen.in_proj_weight
        self.down = torch.nn.Parameter(adapters.started(tower, block, (3, self.settings.rank, width)).to(like))  # A
        self.up = torch.nn.Parameter(like.new_zeros(3, width, self.settings.rank))  # B: the first step starts at CLIP

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
        kept = self.adapters.mask(self.tower, self.block, *x.shape[1:])
        return x * kept.to(x) / (1 - p)

    @torch.no_grad()
    def merged(self) -> torch.nn.MultiheadAttention:
        """The attention it stood in for, with W_j + s·B_j·A_j for weights."""
        self.frozen.in_proj_weight.add_(self.settings.scaling * (self.up @ self.down).flatten(0, 1))
        return self.frozen


@contextlib.contextmanager
def adapted(clip: Clip, settings: LoraSettings, seed: int) -> Iterator[None]:
    """Within: a CLIP of which only adapters can be trained. Afterwards: a plain CLIP with the adapters merged."""
    trainable = [parameter for parameter in clip.model.parameters() if parameter.requires_grad]
    clip.adapters = attach(clip.model, Adapters(settings, seed, clip.device))
    try:
        yield
    finally:
        merge(clip.model)
        clip.adapters = None
        for parameter in trainable:
            parameter.requires_grad_(True)


def require_attention(model: Any) -> None:
    """Raises ModelError for a tower that is no transformer, or one whose attention is of another kind."""
    for blocks in compat.towers(model).values():
        for block in blocks or [None]:
            attention = getattr(block, "attn", None)
            if not isinstance(attention, torch.nn.MultiheadAttention):
                raise ModelError(
                    "--tuning lora needs two transformers with plain multi-head attention, but one of this model's "
                    f"towers has {type(attention or model.visual).__name__}: use --tuning full."
                )


def attach(model: Any, adapters: Adapters) -> Adapters:
    """Freeze a CLIP of open_clip's, and put adapters on the attention of every block of both its towers.

    Raises:
        ModelError: a tower that is no transformer, or one whose attention is of another kind.
    """
    require_attention(model)
    model.requires_grad_(False)
    for tower, blocks in compat.towers(model).items():
        for number, block in enumerate(blocks):
            block.attn = LoraAttention(block.attn, adapters, tower, number)
    return adapters


def merge(model: Any) -> None:
    """Add the adapters to the weights they belong to: what is left is a plain CLIP again, still frozen."""
    for blocks in compat.towers(model).values():
        for block in blocks:
            block.attn = block.attn.merged()
